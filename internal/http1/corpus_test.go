package http1

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"testing"
)

//go:embed testdata/corpus.jsonl
var corpus []byte

// corpusCase is described in testdata/README.md.
type corpusCase struct {
	ID     string
	Raw    []byte
	Then   []byte
	Route  string
	Up     string
	Expect string
	Close  bool
	MaxUp  int `json:"max_up"`
	Checks struct {
		Body        *string
		Target      string
		Host        string
		Absent      []string
		Present     []string
		AbsentValue []string `json:"absent_value"`
		Replies     int
		Tunnel      bool
		MaySmug     bool `json:"may_smug"`
	}
}

func readCorpus(t testing.TB) []corpusCase {
	t.Helper()
	var cases []corpusCase
	for d := json.NewDecoder(bytes.NewReader(corpus)); d.More(); {
		var c corpusCase
		if err := d.Decode(&c); err != nil {
			t.Fatal(err)
		}
		cases = append(cases, c)
	}
	if len(cases) < 100 {
		t.Fatalf("only %d cases", len(cases))
	}
	return cases
}

// answers are what the recording upstreams say, by the case's field "up".
var answers = map[string]string{
	"200":     "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
	"400":     "HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno",
	"426":     "HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno",
	"404ch":   "HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n",
	"101":     "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
	"101bare": "HTTP/1.1 101 Switching Protocols\r\n\r\n",
}

// TestCorpusHeadsAtEverySplit gives the parser each case in two pieces.
func TestCorpusHeadsAtEverySplit(t *testing.T) {
	t.Parallel()
	for _, c := range readCorpus(t) {
		whole := headScanner{limit: defaultHeadSize}
		wantEnd, wantErr := whole.scan(c.Raw)
		for split := range c.Raw {
			s := headScanner{limit: defaultHeadSize}
			end, err := s.scan(c.Raw[:split])
			if end == 0 && err == nil {
				end, err = s.scan(c.Raw)
			}
			if end != wantEnd || (err == nil) != (wantErr == nil) {
				t.Errorf("%s split at %d: end %d, error %v; want %d, %v", c.ID, split, end, err, wantEnd, wantErr)
			}
		}
	}
}
