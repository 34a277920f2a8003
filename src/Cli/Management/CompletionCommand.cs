// completion: a script with which a shell completes this command's words.

using System.CommandLine;
using XenSharp.Cli.Commands;

namespace XenSharp.Cli.Management;

/// <summary>Prints completion scripts; they ask the command itself, by System.CommandLine's [suggest] directive.</summary>
internal static class CompletionCommand
{
    /// <summary>Where nothing is found, one empty line comes. Options are offered where one is begun; where nothing fits, the shell completes names of files.</summary>
    private const string Bash = """
        # Completion of xensharp's words in bash. To have it in every shell:
        #   xensharp completion bash > /etc/bash_completion.d/xensharp
        _xensharp() {
            local first="${COMP_WORDS[0]}" word="${COMP_WORDS[COMP_CWORD]}" line typed
            typed="xensharp${COMP_LINE:${#first}:$((COMP_POINT - ${#first}))}"
            COMPREPLY=()
            while IFS= read -r line; do
                case "$line" in
                    '') continue ;;
                    -*|/*) [[ "$word" == -* ]] || continue ;;
                esac
                [[ "$line" == "$word"* ]] && COMPREPLY+=("$(printf '%q' "$line")")
            done < <("${first/#\~/$HOME}" "[suggest:${#typed}]" "$typed" 2>/dev/null)
        }
        complete -o default -F _xensharp xensharp
        """;

    private const string Zsh = """
        #compdef xensharp
        # Completion of xensharp's words in zsh. To have it in every shell, in a folder of $fpath:
        #   xensharp completion zsh > /usr/local/share/zsh/site-functions/_xensharp
        _xensharp() {
            local -a found
            local line typed="xensharp ${(j: :)words[2,CURRENT]}"
            while IFS= read -r line; do
                case "$line" in
                    '') continue ;;
                    -*|/*) [[ "$PREFIX" == -* ]] || continue ;;
                esac
                found+=("$line")
            done < <("${(e)words[1]}" "[suggest:${#typed}]" "$typed" 2>/dev/null)
            compadd -a found || _files
        }
        if [ "$funcstack[1]" = "_xensharp" ]; then
            _xensharp "$@"
        else
            compdef _xensharp xensharp
        fi
        """;

    private const string Fish = """
        # Completion of xensharp's words in fish. To have it in every shell:
        #   xensharp completion fish > /etc/fish/completions/xensharp.fish
        function __xensharp_complete
            set -l word (commandline -ct)
            set -l words (commandline -opc)
            set -e words[1]
            set -l found
            set -l typed (string join ' ' -- xensharp $words)" $word"
            for line in (xensharp "[suggest:"(string length -- $typed)"]" $typed 2>/dev/null)
                if string match -q -- '-*' $line; or string match -q -- '/*' $line
                    string match -q -- '-*' $word; or continue
                end
                test -n "$line"; and set -a found $line
            end
            if set -q found[1]
                printf '%s\n' $found
            else
                __fish_complete_path $word
            end
        end
        complete -c xensharp -f -a '(__xensharp_complete)'
        """;

    internal static Command Create()
    {
        var shell = new Argument<string>("shell") { Description = "bash, zsh or fish.", HelpName = "bash|zsh|fish" };
        shell.CompletionSources.Add("bash", "zsh", "fish");
        shell.Validators.Add(static result =>
        {
            if (result.Tokens is [{ Value: var text }] && text is not ("bash" or "zsh" or "fish"))
                result.AddError($"There is completion for bash, zsh and fish; \"{text}\" is none of them.");
        });
        var command = new Command("completion", "Prints a script with which a shell completes commands, options and names of domains.") { shell };
        command.SetAction(parsed =>
        {
            Console.Out.WriteLine(parsed.GetRequiredValue(shell) switch { "bash" => Bash, "zsh" => Zsh, _ => Fish });
            return ExitStatus.Success;
        });
        return command;
    }
}
