package admin

import (
	"cmp"
	"context"
	"net/http"
	"net/http/pprof"
	"strconv"
	"strings"
	"time"
)

const (
	// pprofPath is where the tools that read profiles expect them.
	pprofPath = "/debug/pprof/"

	// maxProfile is the longest time that a profile may cover.
	maxProfile = time.Minute

	// profileMargin is how much longer one of a generation may take.
	profileMargin = 10 * time.Second
)

// profile answers with a profile of the supervisor, or of a generation. (Importing
// net/http/pprof also registers it with http.DefaultServeMux, which nothing serves.)
func (s *Server) profile(w http.ResponseWriter, r *http.Request) error {
	over, err := profileTime(r)
	if err != nil {
		return err
	}
	name := strings.TrimPrefix(r.URL.Path, pprofPath)
	if r.URL.Query().Has("generation") {
		return s.profileGeneration(w, r, name, over)
	}
	headers(w, maxProfile+writeTimeout)
	switch name {
	case "profile":
		pprof.Profile(w, r)
	case "trace":
		pprof.Trace(w, r)
	default:
		pprof.Index(w, r)
	}
	return nil
}

// profileGeneration takes the same names and times as net/http/pprof does.
func (s *Server) profileGeneration(w http.ResponseWriter, r *http.Request, name string, over time.Duration) error {
	number, err := generationNumber(r)
	if err != nil {
		return err
	}
	switch {
	case name == "profile":
		name, over = "cpu", cmp.Or(over, 30*time.Second)
	case name == "trace":
		over = cmp.Or(over, time.Second)
	case over != 0:
		return &failure{http.StatusBadRequest, "of a generation, only profile and trace take ?seconds="}
	}
	ctx, cancel := context.WithTimeout(r.Context(), over+profileMargin)
	defer cancel()
	data, err := s.cmds.Profile(ctx, number, name, over)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	answer(w, http.StatusOK)
	w.Write(data) // an error is the peer's absence
	return nil
}

// profileTime returns ?seconds=, or 0 if it is absent.
func profileTime(r *http.Request) (time.Duration, error) {
	if !r.URL.Query().Has("seconds") {
		return 0, nil
	}
	n, err := strconv.Atoi(r.URL.Query().Get("seconds"))
	if err != nil || n < 1 || n > int(maxProfile/time.Second) {
		return 0, &failure{http.StatusBadRequest, "?seconds= takes a number from 1 to 60"}
	}
	return time.Duration(n) * time.Second, nil
}
