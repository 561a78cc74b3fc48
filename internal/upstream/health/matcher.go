package health

// Matcher finds some texts in a stream, one behind the other, with anything before and between
// them. What is made of it for each stream is a [Match].
type Matcher struct{ texts []text }

// text is what is looked for, and how much of it is there still if, behind so many bytes of it,
// something else comes (Knuth, Morris and Pratt).
type text struct {
	bytes   []byte
	retreat []int32
}

// NewMatcher returns one for texts, none of which is empty. None at all are found at once.
func NewMatcher(texts ...[]byte) *Matcher {
	m := new(Matcher)
	for _, b := range texts {
		t := text{bytes: b, retreat: make([]int32, len(b))}
		var k int32
		for i := 1; i < len(b); i++ {
			for k > 0 && b[i] != b[k] {
				k = t.retreat[k-1]
			}
			if b[i] == b[k] {
				k++
			}
			t.retreat[i] = k
		}
		m.texts = append(m.texts, t)
	}
	return m
}

// Match is how far a stream was looked through. The zero value, with a Matcher, is at its begin.
type Match struct {
	Of    *Matcher
	found int   // texts
	part  int32 // of the next one
}

// Done says whether all was found.
func (m *Match) Done() bool { return m.found == len(m.Of.texts) }

// Feed looks through the next bytes of the stream, of which it keeps nothing. It says whether
// all was found.
func (m *Match) Feed(p []byte) bool {
	for _, c := range p {
		if m.Done() {
			break
		}
		t := &m.Of.texts[m.found]
		for m.part > 0 && t.bytes[m.part] != c {
			m.part = t.retreat[m.part-1]
		}
		if t.bytes[m.part] == c {
			m.part++
		}
		if int(m.part) == len(t.bytes) {
			m.found, m.part = m.found+1, 0
		}
	}
	return m.Done()
}
