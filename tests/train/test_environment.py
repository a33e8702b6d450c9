"""What a run says about its code; and that no setting of a stranger's repository makes git run anything."""
import shutil
import subprocess

import pytest

from jetson_det.train.environment import git_state

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


def git(folder, *words):
    call = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always", *words]
    return subprocess.run(call, cwd=folder, check=True, capture_output=True, text=True).stdout


def repository(folder, **files):
    "A repository with these files in its first commit."
    folder.mkdir(parents=True)
    git(folder, "init", "-b", "main")
    for name, text in {"a.txt": "one\n", **files}.items(): (folder/name).write_text(text)
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    return folder


@pytest.fixture
def spy(tmp_path):
    "A program, and the file that is there once it has run."
    ran = tmp_path/"ran"
    program = tmp_path/"spy.sh"
    program.write_text(f"#!/bin/sh\ntouch {ran}\ncat\n")
    program.chmod(0o755)
    return program, ran


def with_fsmonitor(mine, program): git(mine, "config", "core.fsmonitor", str(program))
def with_external_diff(mine, program): git(mine, "config", "diff.external", str(program))


def with_included_settings(mine, program):
    (mine/"more").write_text(f"[core]\n\tfsmonitor = {program}\n")
    git(mine, "config", "include.path", "../more")


def with_filter(mine, program):
    for name in ("clean", "smudge", "process"): git(mine, "config", f"filter.spy.{name}", str(program))
    (mine/".gitattributes").write_text("*.txt filter=spy\n")


def with_diff_driver(mine, program):
    for name in ("textconv", "command"): git(mine, "config", f"diff.spy.{name}", str(program))
    (mine/".gitattributes").write_text("*.txt diff=spy\n")


def with_hooks(mine, program):
    git(mine, "config", "core.hooksPath", "hooks")
    (mine/"hooks").mkdir()
    for name in ("post-index-change", "fsmonitor-watchman", "pre-commit"): shutil.copy(program, mine/"hooks"/name)


def with_submodule(mine, program):
    repository(mine.parent/"part")
    git(mine, "submodule", "add", str(mine.parent/"part"), "part")
    git(mine, "commit", "-m", "a part")
    git(mine/"part", "config", "core.fsmonitor", str(program))
    (mine/"part"/"a.txt").write_text("other\n")


def with_lazy_objects(mine, program):
    "An object is missing, and where it is to be fetched from a program is named."
    git(mine, "config", "core.repositoryformatversion", "1")
    git(mine, "config", "extensions.partialClone", "origin")
    git(mine, "config", "remote.origin.promisor", "true")
    git(mine, "config", "remote.origin.url", str(mine))
    git(mine, "config", "remote.origin.uploadpack", str(program))
    digits = git(mine, "rev-parse", "HEAD:a.txt").strip()
    (mine/".git"/"objects"/digits[:2]/digits[2:]).unlink()


def with_programs_for_all_else(mine, program):
    for name in ("core.pager", "core.editor", "core.sshCommand", "core.askPass", "core.gitProxy", "gpg.program",
                 "credential.helper", "core.alternateRefsCommand", "sequence.editor"):
        git(mine, "config", name, str(program))
    git(mine, "config", "alias.status", f"!{program}")
    git(mine, "config", "alias.diff", f"!{program}")


HOSTILE = [with_fsmonitor, with_external_diff, with_included_settings, with_filter, with_diff_driver, with_hooks,
           with_submodule, with_lazy_objects, with_programs_for_all_else]


@pytest.mark.parametrize("prepare", HOSTILE)
def test_no_program_of_a_repository_is_run(tmp_path, spy, prepare):
    program, ran = spy
    mine = repository(tmp_path/"repositories"/"mine")
    prepare(mine, program)
    ran.unlink(missing_ok=True)
    (mine/"a.txt").write_text("two\n")
    state, patch = git_state(mine)
    assert not ran.exists()
    if prepare is not with_lazy_objects: assert state["root"] == str(mine) and b"+two" in patch


def test_some_of_these_do_run_when_git_is_called_plainly(tmp_path, spy):
    program, ran = spy
    mine = repository(tmp_path/"mine")
    with_fsmonitor(mine, program)
    git(mine, "status")
    assert ran.exists()


def test_programs_named_by_the_environment_are_not_run_either(tmp_path, spy, monkeypatch):
    program, ran = spy
    mine = repository(tmp_path/"mine")
    (mine/"a.txt").write_text("two\n")
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", str(program))
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert b"+two" in git_state(mine)[1] and not ran.exists()


def test_branches_tags_worktrees_and_packed_references(tmp_path):
    mine = repository(tmp_path/"mine")
    commit = git(mine, "rev-parse", "HEAD").strip()
    git(mine, "switch", "-c", "feature/x")
    assert (git_state(mine)[0]["commit"], git_state(mine)[0]["branch"]) == (commit, "feature/x")
    git(mine, "pack-refs", "--all")
    assert git_state(mine)[0]["branch"] == "feature/x" and git_state(mine)[0]["commit"] == commit
    git(mine, "worktree", "add", str(tmp_path/"other"), "main")
    (tmp_path/"other"/"a.txt").write_text("three\n")
    state, patch = git_state(tmp_path/"other")
    assert (state["branch"], state["root"], state["changed"]) == ("main", str(tmp_path/"other"), [" M a.txt"])
    assert b"+three" in patch and git_state(mine)[1] is None
    git(mine, "checkout", "--detach")
    assert git_state(mine)[0]["branch"] == "HEAD"
    sub = mine/"a"/"b"
    sub.mkdir(parents=True)
    assert git_state(sub)[0]["root"] == str(mine)


HEADS = ["ref: ../../../etc/passwd\n", "ref: refs/heads/../../config\n", "", "ref: \n", "x" * 40]

@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_names_no_commit_is_no_repository(tmp_path, head):
    mine = repository(tmp_path/"mine")
    (mine/".git"/"HEAD").write_text(head)
    assert git_state(mine) == ({}, None)
