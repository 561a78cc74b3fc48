package demo

import (
	_ "embed"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/coder/websocket"
)

//go:embed page.html
var page []byte

// serveUpstream prints its address on a line of out and serves until in ends.
func serveUpstream(in io.Reader, out io.Writer) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Fprintln(out, listener.Addr())
	server := &http.Server{Handler: upstream()}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	io.Copy(io.Discard, in)
	server.Close()
	<-served // [http.ErrServerClosed]
	return nil
}

// upstream is a page, an echo over WebSocket, and a clock as an event stream.
func upstream() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", hello)
	mux.HandleFunc("/echo", echo)
	mux.HandleFunc("/events", clock)
	return mux
}

func hello(w http.ResponseWriter, r *http.Request) {
	if strings.Contains(r.Header.Get("Accept"), "text/html") {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Write(page)
		return
	}
	fmt.Fprintf(w, "hello from the echo server (pid %d)\n", os.Getpid())
	for _, name := range []string{"X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Request-Id"} {
		if value := r.Header.Get(name); value != "" {
			fmt.Fprintf(w, "%s: %s\n", name, value)
		}
	}
}

func echo(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return // Accept has answered
	}
	defer conn.CloseNow()
	for {
		kind, message, err := conn.Read(r.Context())
		if err != nil {
			return
		}
		if err := conn.Write(r.Context(), kind, message); err != nil {
			return
		}
	}
}

func clock(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	flush := http.NewResponseController(w)
	for now := time.Now(); ; {
		fmt.Fprintf(w, "data: %s\n\n", now.Format(time.TimeOnly))
		if err := flush.Flush(); err != nil {
			return
		}
		select {
		case now = <-tick.C:
		case <-r.Context().Done():
			return
		}
	}
}
