package control

import "golang.org/x/sys/unix"

// The codec of vault packets.
var (
	DecodeVault = decodeVault
	EncodeVault = (*VaultPacket).encode
)

// LimitOOB leaves room for so many descriptors in what is received.
func LimitOOB(v *Vault, files int) { v.oob = v.oob[:unix.CmsgSpace(files*4)] }
