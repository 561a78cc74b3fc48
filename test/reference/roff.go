package main

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A page is a manual page in the making (man(7)). What is written into it is the Markdown that
// the documentation and the help of commands make use of.
type page struct {
	bytes.Buffer
	below bool // right below a heading, which begins a paragraph itself
}

func newPage(name string, section int, title string) *page {
	p := new(page)
	fmt.Fprintf(p, ".\\\" Made by: make generate\n.TH %s %d \"\" Holdfast \"%s\"\n", strings.ToUpper(name), section, title)
	return p
}

// section begins one; in capitals, as is the custom, unless it is code.
func (p *page) section(title string) {
	if !strings.Contains(title, "`") {
		title = strings.ToUpper(title)
	}
	p.macro(".SH", title)
}

func (p *page) subsection(title string) { p.macro(".SS", title) }

func (p *page) macro(name, text string) {
	fmt.Fprintf(p, "%s \"%s\"\n", name, strings.ReplaceAll(inline(text), `"`, `""`))
	p.below = true
}

// gap begins a paragraph.
func (p *page) gap() {
	if !p.below {
		p.WriteString(".PP\n")
	}
	p.below = false
}

// tagged writes a paragraph that hangs behind a tag.
func (p *page) tagged(tag, text string) {
	p.below = false
	fmt.Fprintf(p, ".TP\n%s\n", atLineStart(inline(tag)))
	p.flow(text)
}

func (p *page) paragraph(text string) {
	p.gap()
	p.flow(text)
}

// verbatim writes lines as they are.
func (p *page) verbatim(lines []string) {
	p.gap()
	p.WriteString(".RS 4\n.nf\n")
	for _, l := range lines {
		if l == "" {
			l = `\&`
		} else {
			l = atLineStart(escape(l))
		}
		p.WriteString(l + "\n")
	}
	p.WriteString(".fi\n.RE\n")
}

// flow fills lines with text, and ends them with sentences, after which roff leaves more room.
func (p *page) flow(text string) {
	const width = 76
	line := ""
	end := func() {
		if line != "" {
			p.WriteString(atLineStart(line) + "\n")
		}
		line = ""
	}
	for word := range strings.FieldsSeq(inline(text)) {
		if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width {
			end()
		}
		if line != "" {
			line += " "
		}
		line += word
		if bare := strings.TrimSuffix(strings.TrimSuffix(word, ")"), `\fR`); strings.HasSuffix(bare, ".") && len(bare) > 3 {
			end()
		}
	}
	end()
}

// atLineStart keeps text from being a request.
func atLineStart(text string) string {
	if strings.HasPrefix(text, ".") || strings.HasPrefix(text, "'") {
		return `\&` + text
	}
	return text
}

// escape writes text as it is.
func escape(text string) string {
	return strings.NewReplacer(`\`, `\e`, "-", `\-`, "^", `\(ha`, "~", `\(ti`, "`", `\(ga`, "'", `\(aq`).Replace(text)
}

var strong = regexp.MustCompile(`\*\*(.+?)\*\*`)

// inline makes code and what is strong bold, and of links their text.
func inline(markdown string) string {
	var out strings.Builder
	for i, part := range strings.Split(unlinked(markdown), "`") {
		if i%2 == 1 {
			out.WriteString(`\fB` + escape(part) + `\fR`)
			continue
		}
		part = strings.ReplaceAll(strings.ReplaceAll(part, `\`, `\e`), "'", `\(aq`)
		out.WriteString(strong.ReplaceAllString(part, `\fB$1\fR`))
	}
	return out.String()
}

// markdown writes a text of blocks. Headings of the first level it leaves out.
func (p *page) markdown(text string) {
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); {
		block := 1 // lines of it
		for i+block < len(lines) && continues(lines[i], lines[i+block]) {
			block++
		}
		p.block(lines[i : i+block])
		i += block
	}
}

// continues says whether a line goes on with the block that another line has begun.
func continues(first, line string) bool {
	switch {
	case first == "", first == "```", strings.HasPrefix(first, "#"):
		return false
	case strings.HasPrefix(first, "```"):
		return line != "```"
	case strings.HasPrefix(first, "    "):
		return strings.HasPrefix(line, "    ")
	case strings.HasPrefix(first, "|"):
		return strings.HasPrefix(line, "|")
	case strings.HasPrefix(first, "- "):
		return strings.HasPrefix(line, "  ")
	}
	return line != "" && !strings.HasPrefix(line, "- ") && !strings.HasPrefix(line, "|") && !strings.HasPrefix(line, "```")
}

func (p *page) block(lines []string) {
	first := lines[0]
	switch {
	case first == "", first == "```", strings.HasPrefix(first, "# "), strings.HasPrefix(first, "<!--"):
	case strings.HasPrefix(first, "```"):
		p.verbatim(lines[1:])
	case strings.HasPrefix(first, "## "):
		p.section(strings.TrimPrefix(first, "## "))
	case strings.HasPrefix(first, "#"):
		p.subsection(strings.TrimLeft(first, "# "))
	case strings.HasPrefix(first, "    "):
		for i := range lines {
			lines[i] = strings.TrimPrefix(lines[i], "    ")
		}
		p.verbatim(lines)
	case strings.HasPrefix(first, "|"):
		p.table(lines)
	case strings.HasPrefix(first, "- "):
		p.below = false
		p.WriteString(".IP \\(bu 2\n")
		p.flow(strings.TrimPrefix(strings.Join(lines, " "), "- "))
	default:
		p.paragraph(strings.Join(lines, " "))
	}
}

// table writes rows as paragraphs behind their first cells.
func (p *page) table(lines []string) {
	head := cells(lines[0])
	for _, line := range lines[2:] {
		row := cells(line)
		if len(head) == 4 && head[1] == "type" && head[3] == "meaning" {
			p.tagged(row[0]+" ("+kindAndDefault(row[1], row[2])+")", row[3])
			continue
		}
		if len(head) == 2 {
			p.tagged(row[0], row[1])
			continue
		}
		var rest []string
		for i, cell := range row[1:] {
			if cell == "" {
				continue
			}
			if name := head[i+1]; name != "" && name != "meaning" && name != "value" {
				cell = name + ": " + cell
			}
			rest = append(rest, strings.TrimSuffix(cell, "."))
		}
		p.tagged(row[0], strings.Join(rest, ". "))
	}
}

func kindAndDefault(kind, fallback string) string {
	switch {
	case fallback == "required":
		return kind + ", required"
	case fallback == "", fallback == "none":
		return kind
	}
	return kind + ", default: " + fallback
}

var cellEnd = regexp.MustCompile(`([^\\])\|`)

func cells(line string) (row []string) {
	line = strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(line), "|"), "|")
	for cell := range strings.SplitSeq(cellEnd.ReplaceAllString(line, "$1\x00"), "\x00") {
		row = append(row, strings.TrimSpace(strings.ReplaceAll(cell, `\|`, "|")))
	}
	return row
}

// help writes the text of a command's help: paragraphs, and indented lines as they are.
func (p *page) help(text string) {
	for paragraph := range strings.SplitSeq(text, "\n\n") {
		lines := strings.Split(strings.Trim(paragraph, "\n"), "\n")
		from := 0
		for i := 0; i <= len(lines); i++ {
			if i < len(lines) && strings.HasPrefix(lines[i], "  ") == strings.HasPrefix(lines[from], "  ") {
				continue
			}
			if strings.HasPrefix(lines[from], "  ") {
				p.verbatim(unindented(lines[from:i]))
			} else {
				p.paragraph(strings.Join(lines[from:i], " "))
			}
			from = i
			if i == len(lines) {
				break
			}
		}
	}
}

func unindented(lines []string) (out []string) {
	least := len(lines[0])
	for _, l := range lines {
		if t := strings.TrimLeftFunc(l, unicode.IsSpace); t != "" {
			least = min(least, len(l)-len(t))
		}
	}
	for _, l := range lines {
		out = append(out, l[min(least, len(l)):])
	}
	return out
}
