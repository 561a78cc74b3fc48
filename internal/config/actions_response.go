package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// mostBody is how long the body of a direct response may be.
const mostBody = 64 << 10

func readDirectResponse(route *table) *DirectResponse {
	t := route.table("direct_response")
	var d DirectResponse
	status := int64(0)
	if t.integer("status", &status, 200, 599); !t.has("status") {
		t.at("status").fail("missing; must be an integer from 200 to 599")
	}
	d.Status = int(status)
	read(t, "body", &d.Body, shortBody)
	read(t, "file", &d.File, bodyFile)
	if t.has("body") && t.has("file") {
		t.at("file").fail("excludes body; drop one of the two")
	}
	has := t.has("body") || t.has("file")
	if has && (status == 204 || status == 205 || status == 304) {
		t.at("status").fail("an answer with %d has no body; drop it, or choose another status", status)
	}
	d.ContentType = "text/plain; charset=utf-8"
	if read(t, "content_type", &d.ContentType, contentType); !has {
		d.ContentType = ""
		t.inapplicable("content_type", "has no meaning without a body; give body or file, or drop it")
	}
	t.strict()
	return &d
}

var shortBody = form[string]{"a text of at most 64 KiB", func(s string) (string, error) {
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' && r != '\n' && r != '\r' && r != '\t' || r == 0x7f }) {
		return "", errors.New("it holds a control character; a file may")
	}
	if len(s) > mostBody {
		return "", fmt.Errorf("it has %d bytes; a file of your own server is the place for it", len(s))
	}
	return s, nil
}, asIs}

var bodyFile = form[string]{`an absolute path like "/etc/holdfast/sorry.html"`, func(s string) (string, error) {
	return parseFilePath(s, maxPath)
}, asIs}

var contentType = form[string]{`a media type like "text/html; charset=utf-8"`, func(s string) (string, error) {
	kind, _, _ := strings.Cut(s, ";")
	major, minor, ok := strings.Cut(strings.TrimSpace(kind), "/")
	if !ok || !isToken(major) || !isToken(minor) || len(s) > 256 || hasControl(s) || strings.ContainsFunc(s, func(r rune) bool { return r >= 0x7f }) {
		return "", errForm
	}
	return s, nil
}, asIs}

// ReadBodies reads the files that answers of our own come from. It belongs behind [Parse],
// which does no I/O, and before anybody else has the configuration. The error joins one for
// each file that cannot be read, or is too large.
func (c *Config) ReadBodies() error {
	var errs []error
	for i := range c.VirtualHosts {
		for j := range c.VirtualHosts[i].Routes {
			r := &c.VirtualHosts[i].Routes[j]
			if r.Direct == nil || r.Direct.File == "" {
				continue
			}
			d := r.Direct
			body, err := readBody(d.File)
			if err != nil {
				errs = append(errs, fmt.Errorf("virtual_hosts[%d].routes[%d].direct_response.file: %w", i, j, err))
			}
			d.Body = body
		}
	}
	return errors.Join(errs...)
}

// readBody reads a regular file. With O_NONBLOCK nobody waits for the other end of a pipe.
func readBody(path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is no regular file", strconv.Quote(path))
	}
	data, err := io.ReadAll(io.LimitReader(f, mostBody+1))
	if err == nil && len(data) > mostBody {
		err = fmt.Errorf("%s has more than 64 KiB, which is the most that a direct response may have", strconv.Quote(path))
	}
	return string(data), err
}
