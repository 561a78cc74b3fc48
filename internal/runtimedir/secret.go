package runtimedir

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
)

const secretSize = 32

// Secret returns what the keys of the generations come from. It is made, and fresh, if
// there is none yet, if what is there cannot be it, or if others could have read it: no
// generation that lives has a key of it then. It is for whoever holds the lock.
func (d *Dir) Secret() (secret []byte, fresh bool, err error) {
	secret, info, err := d.read("secret", secretSize)
	switch {
	case err == nil && len(secret) == secretSize && info.Mode().Perm()&0o077 == 0:
		return secret, false, nil
	case err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errUnfit):
		return nil, false, fmt.Errorf("secret: %w", err) // it may be good
	}
	secret = make([]byte, secretSize)
	rand.Read(secret) // never fails
	if err := d.replace("secret", secret); err != nil {
		return nil, false, fmt.Errorf("secret: %w", err)
	}
	return secret, true, nil
}
