package control

import "golang.org/x/sys/unix"

// The codec of vault packets.
var (
	DecodeVault = decodeVault
	EncodeVault = func(p *VaultPacket) (b []byte, fds []int, err error) { return p.encode(nil, nil) }
)

// LimitOOB leaves room for so many descriptors in what is received.
func LimitOOB(v *Vault, files int) { v.oob = v.oob[:unix.CmsgSpace(files*4)] }

// LimitPassage is LimitOOB for a passage.
func LimitPassage(p *Passage, files int) { p.files = files }

// DecodePassed takes a packet of connections apart.
var DecodePassed = decodePassed
