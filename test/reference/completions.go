package main

import (
	"bytes"

	"github.com/spf13/cobra"
)

// completion is the script with which a shell completes the command line. What there is to
// complete it asks the program itself, so it does not change with the commands.
func completion(script func(*cobra.Command, *bytes.Buffer) error) []byte {
	var out bytes.Buffer
	if err := script(program(), &out); err != nil {
		panic(err)
	}
	return out.Bytes()
}

func bashCompletion() []byte {
	return completion(func(c *cobra.Command, out *bytes.Buffer) error { return c.GenBashCompletionV2(out, true) })
}

func zshCompletion() []byte {
	return completion(func(c *cobra.Command, out *bytes.Buffer) error { return c.GenZshCompletion(out) })
}

func fishCompletion() []byte {
	return completion(func(c *cobra.Command, out *bytes.Buffer) error { return c.GenFishCompletion(out, true) })
}
