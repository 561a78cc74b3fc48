package peer

import (
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
)

// ServeHTTPUtil is the standard library's reverse proxy, as it is, but that it keeps as many
// connections to the upstream as others do.
func ServeHTTPUtil(listen, upstream string) error {
	target := &url.URL{Scheme: "http", Host: upstream}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConns, transport.MaxIdleConnsPerHost = 0, kept
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport: transport,
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	return (&http.Server{Addr: listen, Handler: proxy, ErrorLog: proxy.ErrorLog}).ListenAndServe()
}

// ServeIOCopy relays TCP connections, with a goroutine and io.Copy for each direction.
func ServeIOCopy(listen, upstream string) error {
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	for {
		down, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer down.Close()
			up, err := net.Dial("tcp", upstream)
			if err != nil {
				return
			}
			defer up.Close()
			there := make(chan struct{})
			go func() {
				defer close(there)
				copyAndEnd(up, down)
			}()
			copyAndEnd(down, up)
			<-there
		}()
	}
}

func copyAndEnd(to, from net.Conn) {
	io.Copy(to, from)
	to.(*net.TCPConn).CloseWrite()
}
