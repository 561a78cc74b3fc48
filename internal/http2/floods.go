package http2

import (
	"time"

	"golang.org/x/net/http2"
)

// A flood is what a client sends too much of, that costs us and is of no use to it.
type flood uint8

const (
	noFlood              flood = iota
	floodOfResets              // streams that it resets as soon as they have begun (CVE-2023-44487), or has us reset (CVE-2025-8671)
	floodOfStreams             // that nobody answers any more
	floodOfContinuations       // CVE-2024-27316
	floodOfHeaders             // a header block without end
	floodOfPings               // CVE-2019-9512, and whatever else is to be answered
	floodOfSettings            // CVE-2019-9515
	floodOfPriorities          // CVE-2019-9513
	floodOfWindows             // updates of them
	floodOfEmpty               // frames with neither content nor an end (CVE-2019-9518)
	floodOfUnknown             // frames of kinds that nobody knows
	numFloods
)

var floodNames = [numFloods]string{
	floodOfResets: "resets", floodOfStreams: "streams", floodOfContinuations: "continuations", floodOfHeaders: "headers", floodOfPings: "pings", floodOfSettings: "settings",
	floodOfPriorities: "priorities", floodOfWindows: "window_updates", floodOfEmpty: "empty_frames", floodOfUnknown: "unknown_frames",
}

// What is taken of such frames, beside what is in relation to those that are of use. These are
// Envoy's defaults where it has any.
const (
	mostEmpty        = 1   // in a row
	prioritiesStream = 100 // for each stream
	windowsBase      = 5
	windowsStream    = 2
	windowsData      = 20   // for each frame of content that we have sent
	controlsBase     = 1000 // pings, settings and unknown frames, each
	controlsData     = 2    // for each frame with content, whoever has sent it: some clients measure with pings what they receive
	controlsSecond   = 50   // for each second

	streamsUnsuspected = 500 // from so many on, no more than half may have been reset early
	earlyReset         = time.Second
)

// inbound counts frames of a client. The one who reads owns it.
type inbound struct {
	began time.Time

	streams, data, empty                                  uint64
	resets, pings, settings, priorities, windows, unknown uint64
}

// frame counts one, and says whether that is too much. sent is how many with content we have sent,
// provoked how many streams we had to reset.
func (i *inbound) frame(f frame, sent, provoked uint64) flood {
	if f.length == 0 && !f.flags.Has(http2.FlagDataEndStream) && (f.kind == http2.FrameData || f.kind == http2.FrameHeaders || f.kind == http2.FrameContinuation) {
		if i.empty++; i.empty > mostEmpty {
			return floodOfEmpty
		}
	} else if f.length > 0 {
		i.empty = 0
	}
	switch f.kind {
	case http2.FrameData:
		i.data++
	case http2.FrameHeaders:
		i.streams++
		if i.streams > streamsUnsuspected && (i.resets+provoked)*2 > i.streams {
			return floodOfResets
		}
	case http2.FramePing:
		return i.control(&i.pings, floodOfPings, sent)
	case http2.FrameSettings:
		return i.control(&i.settings, floodOfSettings, sent)
	case http2.FramePriority, http2.FramePriorityUpdate:
		if i.priorities++; i.priorities > prioritiesStream*(1+i.streams) {
			return floodOfPriorities
		}
	case http2.FrameWindowUpdate:
		if i.windows++; i.windows > windowsBase+windowsStream*i.streams+windowsData*sent {
			return floodOfWindows
		}
	case http2.FrameRSTStream, http2.FrameGoAway, http2.FramePushPromise, http2.FrameContinuation:
	default:
		return i.control(&i.unknown, floodOfUnknown, sent)
	}
	return noFlood
}

func (i *inbound) control(n *uint64, kind flood, sent uint64) flood {
	*n++
	most := controlsBase + controlsData*(i.streams+i.data+sent)
	if *n <= most {
		return noFlood
	}
	if *n <= most+controlsSecond*uint64(time.Since(i.began)/time.Second) {
		return noFlood
	}
	return kind
}
