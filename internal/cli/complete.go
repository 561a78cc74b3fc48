package cli

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/admin"
)

// completeTimeout is how long somebody who has pressed the key waits for names.
const completeTimeout = time.Second

// completions says what shells complete. What a running service knows they ask it for: numbers
// of generations, names of clusters. Where none answers there is nothing to choose from.
func (c *commands) completions(root *cobra.Command) {
	named := map[string]cobra.CompletionFunc{"generation": c.generationNumbers, "cluster": c.clusterNames}
	for _, cmd := range allOf(root) {
		if cmd.ValidArgs == nil && cmd.ValidArgsFunction == nil {
			cmd.ValidArgsFunction = cobra.NoFileCompletions // files are given by options
		}
		for name, f := range named {
			if cmd.LocalNonPersistentFlags().Lookup(name) == nil {
				continue
			}
			if _, has := cmd.GetFlagCompletionFunc(name); !has {
				cmd.RegisterFlagCompletionFunc(name, f)
			}
		}
	}
}

// allOf are a command and all below it.
func allOf(cmd *cobra.Command) []*cobra.Command {
	all := []*cobra.Command{cmd}
	for _, below := range cmd.Commands() {
		all = append(all, allOf(below)...)
	}
	return all
}

func (c *commands) generationNumbers(cmd *cobra.Command, _ []string, _ string) (numbers []cobra.Completion, _ cobra.ShellCompDirective) {
	c.ask(cmd, completeTimeout, func(ctx context.Context, client *admin.Client) error {
		status, err := client.Status(ctx)
		if err != nil {
			return err
		}
		for _, g := range status.Generations {
			says := fmt.Sprintf("%s, %s", g.State, count(g.Tunnels, "tunnel"))
			numbers = append(numbers, cobra.CompletionWithDesc(strconv.Itoa(g.Number), says))
		}
		return nil
	})
	return numbers, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
}

func (c *commands) clusterNames(cmd *cobra.Command, args []string, _ string) (names []cobra.Completion, _ cobra.ShellCompDirective) {
	if len(args) == 0 {
		c.ask(cmd, completeTimeout, func(ctx context.Context, client *admin.Client) error {
			clusters, err := client.Clusters(ctx, "")
			if err != nil {
				return err
			}
			for i := range clusters.Clusters {
				names = append(names, clusters.Clusters[i].Name)
			}
			return nil
		})
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// runtimeKeys completes the first of each pair, or the only argument.
func (c *commands) runtimeKeys(cmd *cobra.Command, args []string, _ string) (keys []cobra.Completion, _ cobra.ShellCompDirective) {
	if most := map[string]int{"set": len(args) + 1, "reset": 1}[cmd.Name()]; len(args)%2 == 0 && len(args) < most {
		c.ask(cmd, completeTimeout, func(ctx context.Context, client *admin.Client) error {
			runtime, err := client.Runtime(ctx)
			if err != nil {
				return err
			}
			for _, v := range runtime.Values {
				keys = append(keys, v.Key)
			}
			return nil
		})
	}
	return keys, cobra.ShellCompDirectiveNoFileComp
}
