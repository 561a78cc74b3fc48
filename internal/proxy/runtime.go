package proxy

import (
	"errors"

	"holdfast/internal/control"
)

// What a supervisor hears of runtime values, at most.
const (
	mostRuntimeKeys    = 2000
	mostRuntimeNumbers = 8 // of one key
	mostRuntimePlaces  = 8
)

// override has the numbers hold that the supervisor has sent, and no others.
func (g *generation) override(fds []int) error {
	if len(fds) != 1 {
		control.Discard(fds)
		return errors.New("no overrides have come with it")
	}
	var o control.Overrides
	if err := control.ReadPayload(fds[0], &o); err != nil {
		return err
	}
	g.values.Apply(o.Values)
	g.log.Debug("runtime values are overridden", "keys", len(o.Values))
	return nil
}

// sayValues answers with the runtime values that there are.
func (g *generation) sayValues(r received) {
	file, err := control.Payload(g.runtimeValues())
	if err != nil {
		g.answer(r, control.Message{}, err)
		return
	}
	defer file.Close()
	if g.reply(r, control.Message{}, int(file.Fd())) != nil {
		g.distrust(r.from)
	}
}

func (g *generation) runtimeValues() (all control.RuntimeValues) {
	for _, v := range g.values.Values(mostRuntimeNumbers) {
		if len(all.Values) == mostRuntimeKeys {
			all.More++
			continue
		}
		places := g.runtimeKeys[v.Key]
		all.Values = append(all.Values, control.RuntimeValue{
			Key: v.Key, Unit: v.Unit.String(), Configured: v.Configured, Effective: v.Now, Least: v.Least, Most: v.Most,
			Places: places[:min(len(places), mostRuntimePlaces)],
		})
	}
	return all
}
