package admin

import (
	"context"
	"fmt"
	"net/http"
)

func (s *Server) clusters(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	name := r.URL.Query().Get("cluster")
	clusters, err := s.cmds.Clusters(ctx, name)
	if err != nil {
		return err
	}
	if name != "" && len(clusters.Clusters) == 0 {
		return &failure{http.StatusNotFound, fmt.Sprintf("no generation has a cluster %q", name)}
	}
	answerJSON(w, http.StatusOK, clusters)
	return nil
}
