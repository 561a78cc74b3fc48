package admin

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"holdfast/internal/config"
)

// overrideTimeout bounds commands about runtime values, for which every generation is asked
// and told something.
const overrideTimeout = 15 * time.Second

func (s *Server) runtime(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	values, err := s.cmds.Runtime(ctx)
	if err != nil {
		return err
	}
	answerJSON(w, http.StatusOK, values)
	return nil
}

func (s *Server) setRuntime(w http.ResponseWriter, r *http.Request) error {
	values, err := overrides(r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), overrideTimeout)
	defer cancel()
	result, err := s.cmds.Override(ctx, values)
	if err != nil {
		return err
	}
	answerJSON(w, http.StatusOK, result)
	return nil
}

// overrides are the keys and values of a query, which go together by their order.
func overrides(r *http.Request) (map[string]float64, error) {
	keys, numbers := r.URL.Query()["key"], r.URL.Query()["value"]
	if len(keys) == 0 || len(keys) != len(numbers) {
		return nil, &failure{http.StatusBadRequest, "say ?key=KEY&value=NUMBER, once or more"}
	}
	values := make(map[string]float64, len(keys))
	for i, key := range keys {
		v, err := strconv.ParseFloat(numbers[i], 64)
		if err != nil || config.CheckOverride(v) != nil {
			return nil, &failure{http.StatusBadRequest, fmt.Sprintf("?value= takes a number, not %q", numbers[i])}
		}
		if _, twice := values[key]; twice {
			return nil, &failure{http.StatusBadRequest, fmt.Sprintf("?key= has %q twice", key)}
		}
		values[key] = v
	}
	return values, nil
}

func (s *Server) resetRuntime(w http.ResponseWriter, r *http.Request) error {
	query := r.URL.Query()
	if len(query["key"]) > 1 || query.Has("key") && query.Get("key") == "" {
		return &failure{http.StatusBadRequest, "say ?key=KEY once, or leave it out for all of them"}
	}
	ctx, cancel := context.WithTimeout(r.Context(), overrideTimeout)
	defer cancel()
	result, err := s.cmds.ResetOverrides(ctx, query.Get("key"))
	if err != nil {
		return err
	}
	answerJSON(w, http.StatusOK, result)
	return nil
}
