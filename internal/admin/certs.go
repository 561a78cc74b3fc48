package admin

import (
	"context"
	"net/http"
)

func (s *Server) certificates(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	certificates, err := s.cmds.Certificates(ctx)
	if err != nil {
		return err
	}
	answerJSON(w, http.StatusOK, certificates)
	return nil
}
