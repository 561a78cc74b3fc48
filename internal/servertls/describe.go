package servertls

import (
	"holdfast/internal/certfiles"
	"holdfast/internal/control"
)

// Certificates says which certificates are served now, and who signs those of clients.
func (s *Server) Certificates() (all []control.Certificate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, c := range s.o.Config.Certificates {
		d := certfiles.Describe(s.pairs[i].certificate.Leaf)
		d.Listener, d.File, d.Expires, d.Problem = s.o.Listener, c.Certificate, s.pairs[i].expires.UTC(), s.problemLocked(c.Certificate)
		all = append(all, d)
	}
	if s.clients != nil {
		for _, c := range s.clients.all {
			d := certfiles.Describe(c)
			d.Listener, d.File, d.Authority, d.Problem = s.o.Listener, s.o.Config.ClientCA, true, s.problemLocked(s.o.Config.ClientCA)
			all = append(all, d)
		}
	}
	return all
}

// mostProblem bounds what is said of a file: errors have paths, and what libraries say.
const mostProblem = 1024

// problemLocked is why a file is of no use as it is now; "": it is of use.
func (s *Server) problemLocked(path string) string {
	err := s.refused[path]
	if err == nil {
		return ""
	}
	text := err.Error()
	return text[:min(len(text), mostProblem)]
}
