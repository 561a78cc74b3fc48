package control

// RuntimeVersion is that of the payloads below. Of two builds with different ones the
// generation's numbers stay as configured. It has no part in whether a supervisor can command
// a generation.
const RuntimeVersion = 1

// MaxRuntime is the most bytes that a [RuntimeValues] may have. The supervisor decodes it,
// whoever sends it.
const MaxRuntime = 2 << 20

// Overrides are all the numbers that hold in place of configured ones, by runtime key.
type Overrides struct {
	Values map[string]float64 `json:"values"`
}

// RuntimeValues are the keys that a generation knows, as it reports them.
type RuntimeValues struct {
	Values []RuntimeValue `json:"values"`
	More   int            `json:"more,omitempty"` // keys that are left out
}

// RuntimeValue is one key. Several numbers of the configuration may have it; of them and of
// places some may be left out.
type RuntimeValue struct {
	Key        string    `json:"key"`
	Unit       string    `json:"unit"` // "count" or "percent"
	Configured []float64 `json:"configured"`
	Effective  []float64 `json:"effective"`
	Least      float64   `json:"least"`
	Most       float64   `json:"most"`
	Places     []string  `json:"places,omitempty"` // paths of tables in the configuration
}

// ReadRuntimeValues is [ReadPayload] for what a generation answers to [TypeValues].
func ReadRuntimeValues(fd int) (*RuntimeValues, error) {
	v := new(RuntimeValues)
	return v, readPayload(fd, v, MaxRuntime)
}
