"""`megarlhf completion`: a script that completes commands, settings, their values, and files, in bash and in zsh.

The script holds what `--help` shows, as it is when the script is made: a shell that asked Python would wait for torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

from megarlhf import __version__
from megarlhf.commands.table import commands, program
from megarlhf.config import Config, FieldHelp, describe
from megarlhf.config.base import PLACES
from megarlhf.config.describe import NAME
from megarlhf.errors import DONE, printable

FILES = "FILES"
"""Stands among the values of a setting that names a file or a directory."""
KINDS = ("int", "float", "text", "path", "date", "null")
"""Words of a setting's type that are no values worth a key."""

BOTH = """\
# Completion of megarlhf VERSION in SHELL; made by: megarlhf completion shell=SHELL
_megarlhf_settings() {
    case $1 in
SETTINGS
    esac
}

_megarlhf_values() {
    case $1 in
VALUES
    esac
}

# What may follow the first word of commands of two.
_megarlhf_second() {
    case $1 in
SECOND
        *) ;;
    esac
}

# The command that the first two words name.
_megarlhf_command() {
    case " $(_megarlhf_second "$1") " in
        *" $2 "*) echo "$1${2:+ $2}" ;;
        *) echo "$1" ;;
    esac
}

# Every setting that begins with a word, up to its next dot. NAME stands for a name of the user's, who types it.
_megarlhf_names() {
    local name rest mapping given
    for name in $(_megarlhf_settings "$1"); do
        mapping=${name%%.NAME.*}
        if [[ $mapping != "$name" && $2 == "$mapping".*.* ]]; then
            given=${2#"$mapping".}
            name=$mapping.${given%%.*}.${name#*.NAME.}
        fi
        [[ $name == "$2"* ]] || continue
        rest=${name#"$2"}
        case $rest in
            NAME.*) ;;
            *.*) printf '%s\\n' "$2${rest%%.*}." ;;
            *) printf '%s\\n' "$name=" ;;
        esac
    done | sort -u
}

"""
BASH = """\
_megarlhf() {
    local line=${COMP_LINE:0:COMP_POINT} words word="" command before value values file i
    read -ra words <<< "$line"
    i=${#words[@]}
    [[ $line == *[[:space:]] ]] || { i=$((i - 1)); word=${words[i]}; }
    before=${words[i - 1]}
    command=$(_megarlhf_command "${words[1]}" "${words[2]}")
    COMPREPLY=()
    if ((i == 1)); then
        COMPREPLY=($(compgen -W "COMMANDS --help --version" -- "$word"))
        return
    elif [[ $before == --config || $before == -c ]]; then
        value=$word values=FILES
    elif [[ $word == *=* ]]; then
        value=${word#*=} values=$(_megarlhf_values "$command:${word%%=*}")
    elif [[ $before == --help || $before == -h ]]; then
        COMPREPLY=($(_megarlhf_names "$command" "$word" | sed 's/[.=]$//') $(compgen -W all -- "$word"))
        return
    else
        COMPREPLY=($(_megarlhf_names "$command" "$word") $(compgen -W "--config --help" -- "$word"))
        ((i > 2)) || COMPREPLY=($(compgen -W "$(_megarlhf_second "${words[1]}")" -- "$word") "${COMPREPLY[@]}")
        [[ ${COMPREPLY[0]} == -* ]] || compopt -o nospace 2> /dev/null
        return
    fi
    COMPREPLY=($(compgen -W "${values//FILES/}" -- "$value"))
    if [[ $values == *FILES* ]]; then
        compopt -o filenames 2> /dev/null
        while IFS= read -r file; do COMPREPLY+=("$file"); done < <(compgen -f -- "$value")
    fi
    # Where = does not part words, what is completed is all of name=value.
    [[ $word != *=* || $COMP_WORDBREAKS == *=* ]] || COMPREPLY=("${COMPREPLY[@]/#/${word%%=*}=}")
}

complete -F _megarlhf megarlhf
"""
ZSH = """\
_megarlhf() {
    local word=$PREFIX before=${words[CURRENT-1]} values command
    command=$(_megarlhf_command "${words[2]}" "${words[3]}")
    if ((CURRENT == 2)); then
        compadd -- COMMANDS --help --version
    elif [[ $before == --config || $before == -c ]]; then
        _files
    elif [[ $word == *=* ]]; then
        values=$(_megarlhf_values "$command:${word%%=*}")
        compset -P '*='
        [[ $values != *FILES* ]] || _files
        compadd -- ${=values//FILES/}
    elif [[ $before == --help || $before == -h ]]; then
        compadd -- $(_megarlhf_names "$command" "$word" | sed 's/[.=]$//') all
    else
        ((CURRENT > 3)) || compadd -- $(_megarlhf_second "${words[2]}")
        compadd -S '' -- $(_megarlhf_names "$command" "$word")
        compadd -- --config --help
    fi
}

compdef _megarlhf megarlhf
"""
SHELLS = {"bash": BOTH + BASH, "zsh": BOTH + ZSH}


class CompletionConfig(Config):
    """For which shell."""

    shell: Literal["bash", "zsh"] = "bash"
    """The shell. To have it in every one, write the script once, since to make it takes seconds: `megarlhf completion >
    ~/.megarlhf-completion`, and `source ~/.megarlhf-completion` in ~/.bashrc, or in ~/.zshrc after compinit."""


def main(cfg: CompletionConfig, _: Sequence[str]) -> int:
    """`megarlhf completion`."""
    settings = {name: describe(program(made)[0]) for name, made in commands().items()}
    sys.stdout.write(printable(script(cfg.shell, settings)))
    return DONE


def script(shell: Literal["bash", "zsh"], settings: Mapping[str, Sequence[FieldHelp]]) -> str:
    """The script that completes these settings, by command."""
    taking: dict[tuple[str, str], list[str]] = {}
    for command, rows in settings.items():
        for row in rows:
            if found := values_of(row):
                taking.setdefault((row.name.replace(f".{NAME}.", ".*."), found), []).append(command)
    second: dict[str, list[str]] = {}
    for first, _, word in (command.partition(" ") for command in settings if " " in command):
        second.setdefault(first, []).append(word)
    names = {command: " ".join(row.name for row in rows if row.type != "mapping") for command, rows in settings.items()}
    filled = {
        "VERSION": __version__,
        "SHELL": shell,
        "SETTINGS": "\n".join(f"        {_word(command)}) echo {them} ;;" for command, them in names.items()),
        "VALUES": "\n".join(
            f"        {'|'.join(f'{_word(command)}:{name}' for command in them)}) echo {found} ;;"
            for (name, found), them in taking.items()
        ),
        "SECOND": "\n".join(f"        {first}) echo {' '.join(words)} ;;" for first, words in second.items()),
        "COMMANDS": " ".join(dict.fromkeys(command.partition(" ")[0] for command in settings)),
    }
    return re.sub(rf"\b({'|'.join(filled)})\b", lambda word: filled[word[0]], SHELLS[shell])


def _word(command: str) -> str:
    """A command of one word or two as a pattern of the shell's."""
    return command.replace(" ", "\\ ")


def values_of(row: FieldHelp) -> str:
    """What may be typed after the = of a setting: the names among its values, and FILES where it is a place."""
    words = [word.strip() for word in row.type.split("|")]
    named = [word for word in words if re.fullmatch(r"\w[\w.]*", word) and word not in KINDS]
    is_place = "path" in words or row.name.rpartition(".")[2] in (*PLACES, "input", "function")
    return " ".join([*named, *([FILES] if is_place else [])])
