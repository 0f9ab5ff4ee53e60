"""Shell completion: the scripts that shells load, and the answers that those scripts ask for.

A script asks by running ``lamella`` with :data:`VARIABLE` set, in the protocol of typer.
"""

import os
from contextlib import redirect_stderr, suppress
from io import StringIO
from typing import Literal, TypeAlias

import typer
from typer.completion import get_completion_inspect_parameters, shell_complete
from typer.core import TyperGroup

import lamella

VARIABLE = "_LAMELLA_COMPLETE"
"""Set while a shell asks what could stand at the cursor; says how it wants the answer."""

Shell: TypeAlias = Literal["bash", "zsh", "fish"]

Candidate: TypeAlias = tuple[str, str]
"""What could stand there, and a word about it."""

# Not typer's own scripts: its one for bash does not know that bash takes a word apart at characters such as the @ of a
# revision, and puts an answer behind the last of them. Asked for is always the form that typer made for fish, one
# candidate a line with its help after a tab, since that is what a script can read.
_ASK = f"{VARIABLE}=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args _TYPER_COMPLETE_ARGS"

_SCRIPTS: dict[Shell, str] = {
    "bash": rf"""_lamella_completion() {{
    local IFS=$'\n' line=${{COMP_LINE:0:COMP_POINT}}
    local word=${{line##*[[:space:]]}}
    local kept=${{word%"${{word##*[$COMP_WORDBREAKS]}}"}}
    COMPREPLY=($({_ASK}="$line" lamella 2>/dev/null | cut -f 1))
    COMPREPLY=("${{COMPREPLY[@]#"$kept"}}")
}}
complete -o default -F _lamella_completion lamella""",
    "zsh": rf"""#compdef lamella
_lamella_completion() {{
    local line
    local -a found
    for line in "${{(@f)$({_ASK}="${{words[1,CURRENT]}}" lamella 2>/dev/null)}}"; do
        [[ -n $line ]] && found+=("${{${{line%%$'\t'*}}//:/\\:}}:${{${{(M)line%%$'\t'*}}#$'\t'}}")
    done
    if (( $#found )); then _describe lamella found; else _files; fi
}}
compdef _lamella_completion lamella""",
    "fish": rf"""function __lamella_completion
    set -l found ({_ASK}=(commandline -cp | string collect) lamella 2>/dev/null | string match -r '.+')
    if count $found >/dev/null
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete --command lamella --no-files --arguments '(__lamella_completion)'""",
}


def script(shell: Shell) -> str:
    """Return what makes a shell complete the words of ``lamella`` once it has run it."""
    return _SCRIPTS[shell]


def reply(command: TyperGroup) -> None:
    """Answer the shell that asks. Says nothing if anything is wrong: someone is in the middle of a line."""
    with redirect_stderr(StringIO()), suppress(Exception):
        get_completion_inspect_parameters()  # for what it does besides: it makes the shells known to typer
        shell_complete(command, {}, "lamella", VARIABLE, os.environ[VARIABLE])


def revisions(context: typer.Context, incomplete: str) -> list[Candidate]:
    """Return the refs of the models that are meant, and ``latest``."""
    found: list[Candidate] = []
    with _repository(context) as repo:
        for model in _models(repo, incomplete):
            found += [(f"{model}@{ref.name}", f"{ref.kind} at v{ref.number}") for ref in repo.refs(model)]
            found.append((f"{model}@latest", "the newest version"))
    return found


def histories(context: typer.Context, incomplete: str) -> list[Candidate]:
    """Return models, each of which stands for all of its refs, and revisions."""
    with _repository(context) as repo:
        models = [(model, "all of its refs") for model in _models(repo, incomplete)]
    return models + revisions(context, incomplete)


def branches(context: typer.Context, incomplete: str) -> list[Candidate]:
    """Return what can be pushed to."""
    return _refs(context, incomplete, "branch")


def refs_of_verb(context: typer.Context, incomplete: str) -> list[Candidate]:
    """Return the refs of the kind that the verb is named after."""
    return _refs(context, incomplete, context.info_name or "")


def verbs(context: typer.Context) -> list[str]:
    """Return the names of all verbs."""
    command = context.find_root().command
    assert isinstance(command, TyperGroup)
    return list(command.commands)


def _refs(context: typer.Context, incomplete: str, kind: str) -> list[Candidate]:
    with _repository(context) as repo:
        refs = [ref for model in _models(repo, incomplete) for ref in repo.refs(model) if ref.kind == kind]
    return [(f"{ref.model}@{ref.name}", f"at v{ref.number}") for ref in refs]


def _models(repo: lamella.Repository, incomplete: str) -> list[str]:
    """Return the models that a word which begins like this can be about."""
    wanted, at, _ = incomplete.partition("@")
    return [model for model in repo.models() if (model == wanted if at else model.startswith(wanted))]


def _repository(context: typer.Context) -> lamella.Repository:
    # A shell that asks has expanded nothing yet.
    return lamella.open(os.path.expanduser(os.path.expandvars(context.find_root().params["repository"])))
