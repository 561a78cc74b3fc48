package canary

import (
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"time"
)

// serveUpstream starts the server behind the proxy and returns its address.
func (c *canary) serveUpstream() (address string, close func(), err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc(echoPath, echo)
	mux.HandleFunc(slowPath, answerSlowly)
	mux.HandleFunc(TunnelPath, c.acceptTunnel)
	// What goes wrong is for the clients to notice.
	server := &http.Server{Handler: mux, ErrorLog: log.New(io.Discard, "", 0)}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	return listener.Addr().String(), func() {
		server.Close()
		<-served // [http.ErrServerClosed]
	}, nil
}

func echo(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Write(body)
}

// answerSlowly sends the stream that it is asked for piece by piece.
func answerSlowly(w http.ResponseWriter, r *http.Request) {
	number, err := strconv.ParseUint(r.URL.Query().Get("stream"), 10, 64)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	piece := make([]byte, slowPiece)
	for i := range slowPieces {
		streamOf(number).fill(piece, int64(i*slowPiece))
		w.Write(piece)
		http.NewResponseController(w).Flush() // an error is that nobody reads any more
		select {
		case <-time.After(slowPause):
		case <-r.Context().Done():
			return
		}
	}
}
