"""Completion scripts for bash, zsh and fish: `visard --completion bash`.

In: the words of every command. Out: a script that the shell reads once; completing then starts no Python.
Words that begin with a dash are options and offered after a dash, all others in the place right after the command;
files otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHELLS = ("bash", "zsh", "fish")

INSTALL = {
    "bash": "visard --completion bash > ~/.local/share/bash-completion/completions/visard",
    "zsh": "visard --completion zsh > a folder of $fpath, as _visard",
    "fish": "visard --completion fish > ~/.config/fish/completions/visard.fish",
}


def script(shell: str, words: Mapping[str, Sequence[str]]) -> str:
    """The script for one of `SHELLS`.

    Args:
        shell: "bash", "zsh" or "fish".
        words: what may follow, by what stands before: "" has the commands, "train" the words after it, "evaluate pairs"
            those after both. Letters, digits, dots, dashes and underscores only.
    """
    head = f"# completion of visard for {shell}; written by: {INSTALL[shell]}\n"
    if shell == "fish":
        return head + _fish(words)
    functions = _lookup("_visard_options", words, options=True) + _lookup("_visard_words", words, options=False)
    return head + functions + _BASH if shell == "bash" else "#compdef visard\n" + head + functions + _ZSH


def _lookup(name: str, words: Mapping[str, Sequence[str]], *, options: bool) -> str:
    """A function of the shell that prints the words after its two arguments; the longer context comes first."""
    cases = []
    for context in sorted(words, key=lambda c: -len(c.split())):
        chosen = [word for word in words[context] if word.startswith("-") == options]
        if not chosen:
            continue
        pattern = f'"{context}"' if " " in context else f'"{context} "*'
        cases.append(f'    {pattern}) echo "{" ".join(chosen)}" ;;\n')
    return f'{name}() {{\n  case "$1 $2" in\n{"".join(cases)}  esac\n}}\n'


def _fish(words: Mapping[str, Sequence[str]]) -> str:
    lines = []
    for context, following in words.items():
        inner = {c.rsplit(" ", 1)[-1] for c in words if c.startswith(f"{context} ")} if context else set()
        seen = [f"__fish_seen_subcommand_from {word}" for word in context.split()] or ["__fish_use_subcommand"]
        if inner:
            seen.append(f"not __fish_seen_subcommand_from {' '.join(sorted(inner))}")
        condition = "; and ".join(seen)
        plain = [word for word in following if not word.startswith("-")]
        if plain:
            only = "-f " if not context else ""
            lines.append(f"complete -c visard {only}-n '{condition}' -a '{' '.join(plain)}'")
        lines += [f"complete -c visard -n '{condition}' -l {w.lstrip('-')}" for w in following if w.startswith("--")]
    return "\n".join(lines) + "\n"


_BASH = """_visard() {
  local cur="${COMP_WORDS[COMP_CWORD]}" first="" second="" words
  [ "$COMP_CWORD" -gt 1 ] && first="${COMP_WORDS[1]}"
  [ "$COMP_CWORD" -gt 2 ] && second="${COMP_WORDS[2]}"
  case "$cur" in
    -*) words="$(_visard_options "$first" "$second")" ;;
    *) words=""; [ "$COMP_CWORD" -le 2 ] && words="$(_visard_words "$first" "$second")" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -o default -F _visard visard
"""

_ZSH = """_visard() {
  local first="" second="" found
  (( CURRENT > 2 )) && first="${words[2]}"
  (( CURRENT > 3 )) && second="${words[3]}"
  if [[ "$PREFIX" == -* ]]; then
    found="$(_visard_options "$first" "$second")"
  elif (( CURRENT <= 3 )); then
    found="$(_visard_words "$first" "$second")"
  fi
  [[ -n "$found" ]] && compadd -- ${=found}
  [[ "$PREFIX" == -* || $CURRENT -eq 2 ]] || _files
}
if [[ "$funcstack[1]" == _visard ]]; then _visard "$@"; else compdef _visard visard; fi
"""
