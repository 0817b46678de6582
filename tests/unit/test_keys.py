"""Keys: outside the checkout, closed to others, never overwritten, compared by fingerprint."""

import json
import os
import pty
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from dinov3.errors import DinoError
from dinov3.publish.keys import in_groups, main
from dinov3.publish.private_key import keys_folder, load_key
from dinov3.release.public_key import fingerprint
from dinov3.release.revoked import read_revoked


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of keys, as the environment names it; no passphrase in it."""
    monkeypatch.setenv("DINOV3_KEYS", str(tmp_path / "keys"))
    monkeypatch.delenv("DINOV3_PASSPHRASE", raising=False)
    monkeypatch.chdir(tmp_path)  # away from the checkout's own release log
    return tmp_path / "keys"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_new_key_is_closed_to_others_and_shows_its_fingerprint(folder, capsys):
    assert main(["new", "demo", "--no-passphrase"]) == 0
    assert (mode(folder), mode(folder / "demo.pem")) == (0o700, 0o600)
    printed = fingerprint((folder / "demo.pub").read_bytes())
    out = capsys.readouterr().out
    assert printed in out
    assert in_groups(printed) in out
    assert load_key("demo").fingerprint == printed


def test_fingerprint_is_shown_in_two_rows_of_eight_groups():
    rows = in_groups("sha256:" + "0123456789abcdef" * 4).splitlines()
    assert rows == ["  0123 4567 89ab cdef 0123 4567 89ab cdef"] * 2


def test_passphrase_locks_the_key(folder, monkeypatch):
    monkeypatch.setenv("DINOV3_PASSPHRASE", "correct horse")
    assert main(["new", "demo"]) == 0
    assert b"ENCRYPTED" in (folder / "demo.pem").read_bytes()
    assert load_key("demo").fingerprint == fingerprint((folder / "demo.pub").read_bytes())
    monkeypatch.setenv("DINOV3_PASSPHRASE", "wrong")
    with pytest.raises(DinoError, match="the passphrase does not open it"):
        load_key("demo")
    monkeypatch.delenv("DINOV3_PASSPHRASE")
    with pytest.raises(DinoError, match=r"no passphrase was given, and no terminal"):
        load_key("demo")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["correct horse", "correct horse"], "public"),
        (["one", "other"], "the two differ"),
        (["horse", "\x04"], "the input ended"),
    ],
)
def test_passphrase_is_typed_twice_at_a_terminal(typed, says, folder):
    code, shown = type_at_terminal(
        folder, dict(zip(("Passphrase: ", "again: "), typed, strict=True))
    )
    assert says in shown
    assert not any(word in shown for word in typed)
    assert (folder / "demo.pem").exists() == (code == 0) == (says == "public")


def type_at_terminal(folder, answers):
    """Runs `keys new` at a terminal of its own, and answers each prompt once."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dinov3", "keys", "new", "demo"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "DINOV3_KEYS": str(folder)},
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # now the controlling one
    )
    os.close(theirs)
    shown, waiting = "", dict(answers)
    while chunk := read_terminal(ours):
        shown += chunk.decode()
        for prompt in [one for one in waiting if shown.endswith(one)]:
            os.write(ours, waiting.pop(prompt).encode() + b"\n")
    os.close(ours)
    return process.wait(), shown


def read_terminal(descriptor):
    try:
        return os.read(descriptor, 4096)
    except OSError:  # the other side is closed
        return b""


def test_no_passphrase_and_nobody_to_ask_makes_no_key(folder, capsys):
    assert main(["new", "demo"]) == 2
    assert "no terminal to ask at. Set $DINOV3_PASSPHRASE." in capsys.readouterr().err
    assert not (folder / "demo.pem").exists()


def test_empty_passphrase_is_none(monkeypatch, capsys):
    monkeypatch.setenv("DINOV3_PASSPHRASE", "")
    assert main(["new", "demo"]) == 2
    assert "passphrase: empty" in capsys.readouterr().err


@pytest.mark.parametrize("gone", ["demo.pem", "demo.pub"])
def test_key_is_never_overwritten(gone, folder, capsys):
    main(["new", "demo", "--no-passphrase"])
    (folder / gone).unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["new", "demo", "--no-passphrase"]) == 2
    assert "already there, and never overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("git", ["folder", "file"])
def test_no_private_key_in_a_checkout(git, tmp_path, capsys):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    mark = checkout / ".git"
    mark.mkdir() if git == "folder" else mark.touch()  # a worktree has a file there
    inside = checkout / "deep" / "keys"
    assert main(["new", "demo", "--no-passphrase", "--folder", str(inside)]) == 2
    assert f"lies in the git checkout {checkout}" in capsys.readouterr().err
    assert not inside.exists()


def test_link_into_a_checkout_is_seen_through(tmp_path, capsys):
    (tmp_path / "checkout" / ".git").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "checkout")
    assert main(["new", "demo", "--no-passphrase", "--folder", str(tmp_path / "link" / "k")]) == 2
    assert "lies in the git checkout" in capsys.readouterr().err


def test_key_that_got_into_a_checkout_is_not_used(folder):
    main(["new", "demo", "--no-passphrase"])
    (folder / ".git").mkdir()
    with pytest.raises(DinoError, match="where private keys get committed"):
        load_key("demo")


def test_link_to_a_key_in_a_checkout_is_not_used(folder, tmp_path):
    main(["new", "demo", "--no-passphrase"])
    (tmp_path / "checkout" / ".git").mkdir(parents=True)
    moved = (folder / "demo.pem").rename(tmp_path / "checkout" / "demo.pem")
    (folder / "demo.pem").symlink_to(moved)
    with pytest.raises(DinoError, match="where private keys get committed"):
        load_key("demo")


def test_link_to_a_key_elsewhere_is_followed(folder, tmp_path):
    main(["new", "demo", "--no-passphrase"])
    (tmp_path / "disk").mkdir()
    (folder / "demo.pem").symlink_to((folder / "demo.pem").rename(tmp_path / "disk" / "demo.pem"))
    assert load_key("demo").fingerprint == fingerprint((folder / "demo.pub").read_bytes())


def test_pipe_in_the_place_of_a_key_is_not_waited_for(folder, capsys):
    folder.mkdir()
    os.mkfifo(folder / "demo.pem", 0o600)
    with pytest.raises(DinoError, match=r"demo\.pem: .*not a regular file"):
        load_key("demo")
    os.mkfifo(folder / "demo.pub")
    assert main(["show", "demo"]) == 2
    assert "demo: no public key in" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620])
def test_key_that_others_may_read_is_not_used(bits, folder):
    main(["new", "demo", "--no-passphrase"])
    (folder / "demo.pem").chmod(bits)
    with pytest.raises(DinoError, match=f"got mode {bits:04o}. Close it with chmod 600"):
        load_key("demo")


def test_folder_that_others_may_write_gets_no_key(folder, capsys):
    folder.mkdir()
    folder.chmod(0o770)
    assert main(["new", "demo", "--no-passphrase"]) == 2
    assert "Close it with chmod 700" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_every_folder_that_is_made_for_a_key_is_closed(open_umask, tmp_path):
    deep = tmp_path / "a" / "b" / "keys"
    assert main(["new", "demo", "--no-passphrase", "--folder", str(deep)]) == 0
    made = [deep, *deep.parents][:3]
    assert {mode(one) for one in made} == {0o700}
    assert (mode(deep / "demo.pem"), mode(deep / "demo.pub")) == (0o600, 0o644)


def test_folder_behind_a_loop_of_links_is_refused(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert main(["new", "demo", "--no-passphrase", "--folder", str(tmp_path / "loop" / "k")]) == 2
    assert "cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../up", "A", "", "a b", "-x/y", "a" * 65])
def test_name_that_could_be_a_path_is_refused(name, capsys):
    assert main(["new", "--no-passphrase", "--", name]) == 2
    assert "key: not a name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("secret", "kind"),
    [
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519"),
        (ec.generate_private_key(ec.SECP256K1()), "secp256k1"),
    ],
)
def test_key_of_another_kind_signs_no_releases(secret, kind, tmp_path):
    path = tmp_path / "odd.pem"
    path.touch(mode=0o600)
    path.write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with pytest.raises(DinoError, match=f"{kind} signs no releases, elliptic curves P-256"):
        load_key(path)


def test_what_is_no_key_is_refused(tmp_path):
    path = tmp_path / "no.pem"
    path.touch(mode=0o600)
    path.write_bytes(b"nothing")
    with pytest.raises(DinoError, match="not a private key in PEM"):
        load_key(path)
    with pytest.raises(DinoError, match="cannot be read: No such file"):
        load_key("absent")


def test_secret_is_not_shown(folder):
    main(["new", "demo", "--no-passphrase"])
    key = load_key("demo")
    assert format(key.secret.private_numbers().private_value, "x") not in repr(key)
    assert "secret=" not in repr(key)


def test_folder_is_below_the_users_configuration(monkeypatch):
    monkeypatch.delenv("DINOV3_KEYS")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/x")
    assert keys_folder() == Path("/x/dinov3/keys")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert keys_folder() == Path.home() / ".config/dinov3/keys"


def test_show_takes_a_name_a_public_and_a_private_file(folder, capsys, tmp_path):
    log = tmp_path / "log"
    main(["new", "demo", "--no-passphrase", "--log", str(log)])
    capsys.readouterr()
    for named in ("demo", folder / "demo.pub", folder / "demo.pem", log / "keys" / "demo.pub"):
        assert main(["show", str(named), "--log", str(log)]) == 0
    (folder / "demo.pub").unlink()
    assert main(["show", "demo", "--log", str(log)]) == 0
    assert len(set(capsys.readouterr().out.splitlines())) == 3


def test_show_of_nothing_is_refused(capsys):
    assert main(["show", "absent"]) == 2
    assert "absent: no public key in" in capsys.readouterr().err
    assert main(["show", "a" * 300]) == 2
    assert "File name too long. Name another key or folder." in capsys.readouterr().err


def test_log_gets_the_public_key_and_no_second_one(tmp_path, folder, capsys):
    log = tmp_path / "log"
    assert main(["new", "demo", "--no-passphrase", "--log", str(log)]) == 0
    assert (log / "keys" / "demo.pub").read_bytes() == (folder / "demo.pub").read_bytes()
    elsewhere = str(tmp_path / "other")
    assert main(["new", "demo", "--no-passphrase", "--folder", elsewhere, "--log", str(log)]) == 2
    assert "demo.pub: already there" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_log_that_cannot_be_written_leaves_no_key(tmp_path, folder, capsys):
    (tmp_path / "file").touch()
    log = tmp_path / "file" / "log"
    assert main(["new", "demo", "--no-passphrase", "--log", str(log)]) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("taken", ["keys/demo.pub", "log/keys/demo.pub"])
def test_dangling_link_in_the_place_of_a_public_key_leaves_no_private_one(taken, tmp_path, folder):
    link = tmp_path / taken
    link.parent.mkdir(parents=True, mode=0o700)
    link.symlink_to(tmp_path / "nowhere")
    assert main(["new", "demo", "--no-passphrase", "--log", str(tmp_path / "log")]) == 2
    assert not (folder / "demo.pem").exists()
    assert not (tmp_path / "nowhere").exists()


def test_revoked_keys_are_added_once_and_kept(tmp_path, folder, capsys):
    log = tmp_path / "log"
    for name in ("one", "two"):
        main(["new", name, "--no-passphrase"])
    prints = {name: fingerprint((folder / f"{name}.pub").read_bytes()) for name in ("one", "two")}
    assert main(["revoke", "one", "--reason", "lost", "--log", str(log)]) == 0
    assert main(["revoke", prints["two"], "--reason", "stolen", "--log", str(log)]) == 0
    assert main(["revoke", "one", "--reason", "again", "--log", str(log)]) == 0
    assert "already revoked" in capsys.readouterr().out
    found = read_revoked(log / "revoked.json")
    assert {one: found[one].reason for one in found} == {
        prints["one"]: "lost",
        prints["two"]: "stolen",
    }
    assert [path.name for path in log.iterdir()] == ["revoked.json"]


@pytest.mark.parametrize("reason", ["", "two\nlines", "\x1b[31m", "x" * 501])
def test_reason_is_one_line(reason, tmp_path, folder, capsys):
    main(["new", "demo", "--no-passphrase"])
    assert main(["revoke", "demo", "--reason", reason, "--log", str(tmp_path / "log")]) == 2
    assert "Say why in one line" in capsys.readouterr().err
    assert not (tmp_path / "log" / "revoked.json").exists()


def test_damaged_list_is_not_replaced(tmp_path, folder, capsys):
    log = tmp_path / "log"
    log.mkdir()
    (log / "revoked.json").write_text("{")
    main(["new", "demo", "--no-passphrase"])
    assert main(["revoke", "demo", "--reason", "lost", "--log", str(log)]) == 2
    assert "Restore it from git" in capsys.readouterr().err
    assert (log / "revoked.json").read_text() == "{"


def list_json(capsys, *options):
    capsys.readouterr()
    assert main(["list", "--format", "json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_tells_locked_open_and_revoked_keys_apart(folder, tmp_path, monkeypatch, capsys):
    log = tmp_path / "log"
    main(["new", "open", "--no-passphrase"])
    monkeypatch.setenv("DINOV3_PASSPHRASE", "correct horse")
    main(["new", "locked"])
    monkeypatch.delenv("DINOV3_PASSPHRASE")  # nothing is asked: no key is opened
    main(["revoke", "locked", "--reason", "laptop\u202elost", "--log", str(log)])
    prints = {
        name: fingerprint((folder / f"{name}.pub").read_bytes()) for name in ("locked", "open")
    }
    found = list_json(capsys, "--log", str(log))
    assert (found["schema"], found["log"]) == ("dinov3.keys/1", str(log))
    locked, opened = found["keys"]
    assert locked["revoked"].pop("date")
    assert locked == {
        "name": "locked",
        "fingerprint": prints["locked"],
        "passphrase": True,
        "revoked": {"fingerprint": prints["locked"], "reason": "laptop\u202elost"},
        "problem": None,
    }
    assert opened == {
        "name": "open",
        "fingerprint": prints["open"],
        "passphrase": False,
        "revoked": None,
        "problem": None,
    }
    assert main(["list", "--log", str(log)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"locked  passphrase     {prints['locked']}"
    assert lines[1].startswith("        REVOKED 20")
    assert lines[1].endswith(r": laptop\u202elost")
    assert lines[2] == f"open    no passphrase  {prints['open']}"
    assert lines[3] == f"        not revoked in {log}"


def test_list_says_where_nothing_could_have_been_revoked(folder, tmp_path, capsys):
    main(["new", "demo", "--no-passphrase"])
    assert list_json(capsys, "--log", str(tmp_path / "nowhere"))["log"] is None
    assert main(["list", "--log", str(tmp_path / "nowhere")]) == 0
    assert "no log here that could revoke it" in capsys.readouterr().out


def test_list_with_a_damaged_list_of_revoked_keys_is_refused(tmp_path, capsys):
    log = tmp_path / "log"
    log.mkdir()
    (log / "revoked.json").write_text("{")
    main(["new", "demo", "--no-passphrase"])
    assert main(["list", "--log", str(log)]) == 2
    assert "revoked.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: (folder / "demo.pem").chmod(0o644), "others may read this private key"),
        (lambda folder: (folder / "demo.pub").unlink(), "no public key in"),
        (lambda folder: (folder / "demo.pub").write_text("x"), "not a public key in PEM"),
        (lambda folder: (folder / ".git").mkdir(), "where private keys get committed"),
    ],
)
def test_key_that_cannot_be_used_is_listed_with_the_reason(spoil, problem, folder, capsys):
    main(["new", "demo", "--no-passphrase"])
    spoil(folder)
    (demo,) = list_json(capsys)["keys"]
    assert (demo["name"], demo["fingerprint"]) == ("demo", None)
    assert problem in demo["problem"]
    assert main(["list"]) == 0
    assert f"demo  cannot be used here: {demo['problem']}" in capsys.readouterr().out


def test_another_key_of_that_name_in_the_log_is_not_taken_for_the_one_listed(folder, capsys):
    main(["new", "demo", "--no-passphrase", "--folder", "other", "--log", "data/release_log"])
    main(["new", "demo", "--no-passphrase"])
    (folder / "demo.pub").unlink()
    (demo,) = list_json(capsys)["keys"]
    assert demo["fingerprint"] is None
    assert "no public key in" in demo["problem"]


def test_list_of_no_keys_says_how_to_make_one(folder, capsys):
    assert list_json(capsys)["keys"] == []
    assert main(["list"]) == 0
    assert f"{folder}: no key. Make one: dinov3 keys new NAME" in capsys.readouterr().out
    folder.mkdir(parents=True)
    (folder / "notes.txt").touch()
    (folder / "Not A Name.pem").touch()
    assert list_json(capsys)["keys"] == []
    assert main(["list", "--folder", str(folder / "notes.txt")]) == 2
    assert "notes.txt: cannot be read: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["new", "demo", "--no-passphrase"], ["list"]])
def test_verb_is_light(folder, arguments):
    code = (
        f"import sys, json; sys.argv = ['dinov3', 'keys', *{arguments!r}]\n"
        "from dinov3.__main__ import main\n"
        "assert main() == 0\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "numpy", "pydantic", "typer", "model_signing", "sigstore"}


@pytest.mark.parametrize("arguments", [[], ["new"], ["revoke", "demo"], ["other"]])
def test_misuse_exits_with_two(arguments, capsys):
    assert main(arguments) == 2
    assert "usage: dinov3 keys" in capsys.readouterr().err
