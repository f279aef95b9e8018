"""`python -m reward_server judge` against a judge that knows the truth, and against none."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from reward_server import machine
from reward_server.__main__ import main
from reward_server.ask import FAMILIES, Answer, data_urls, read_answer, refusal, rows
from reward_server.asking import Asker, Endpoint
from reward_server.families.base import Reply
from reward_server.families.edit import EditPoint
from reward_server.families.flex import Flex
from testbed import render, scenes
from testbed.oracle_judge import OracleJudge

CAPTION = "a red circle left of a blue square on a white background"
OTHER = "a green cross on a black background"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("GRPO_FLEX_JUDGE_KEY", raising=False)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with OracleJudge().start(tmp_path_factory.mktemp("oracle")) as judge:
        yield judge.endpoints[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A right and a wrong picture, and clips that begin as the other and end so."""
    folder = tmp_path_factory.mktemp("media")
    pictures = {
        name: render.render(scenes.sample_scene(np.random.default_rng(0), scenes.parse(caption)))
        for name, caption in (("right", CAPTION), ("wrong", OTHER))
    }
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
        other = pictures["wrong" if name == "right" else "right"]
        # Smooth colours survive the codec best when the frame is larger than its blocks.
        clip = np.stack([other] * 8 + [picture] * 8).repeat(4, axis=1).repeat(4, axis=2)
        iio.imwrite(folder / f"{name}.mp4", clip, fps=8)
    (folder / "broken.png").write_bytes((folder / "right.png").read_bytes()[:100])
    (folder / "broken.mp4").write_bytes(b"no video")
    # An mp4 that is made to be streamed has its index first: cut in two, it can be read, but its end is missing.
    noise = np.random.default_rng(0).integers(0, 255, (32, 64, 64, 3), dtype=np.uint8)
    for name, options in (("half", []), ("streamed", ["-movflags", "+faststart"])):
        iio.imwrite(folder / f"{name}.mp4", noise, fps=8, output_params=options)
        whole = (folder / f"{name}.mp4").read_bytes()
        (folder / f"{name}.mp4").write_bytes(whole[: len(whole) // 2])
    return {path.name: str(path) for path in folder.iterdir()}


def judge(files: dict[str, str], a: str, b: str, *words: str) -> int:
    return main(["judge", files.get(a, a), files.get(b, b), "--prompt", CAPTION, *words])


def test_two_pictures_give_a_table(endpoint: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(files, "wrong.png", "right.png", "--endpoint", endpoint) == 0
    printed = capsys.readouterr().out
    for expected in ("A wrong.png", "B right.png", "winner", "Semantic Alignment", "Sharpness", "overall"):
        assert expected in printed
    overall = next(line for line in printed.splitlines() if "overall" in line)
    assert " B " in overall and " A " not in overall


def test_both_orders_are_told_apart(endpoint: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(files, "right.png", "wrong.png", "--endpoint", endpoint, "--both-orders") == 0
    assert "Both orders agree: A." in capsys.readouterr().out


def test_a_judge_that_goes_by_position_is_found_out(
    tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with OracleJudge(position_bias=1.0).start(tmp_path) as biased:
        assert judge(files, "right.png", "wrong.png", "--endpoint", biased.endpoints[0], "--both-orders") == 0
    assert "The orders disagree: A with A first, B with B first" in capsys.readouterr().out


def test_two_videos(endpoint: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(files, "wrong.mp4", "right.mp4", "--endpoint", endpoint) == 0
    printed = capsys.readouterr().out
    assert "Video Quality" in printed and "Video 2 measures" in printed
    assert len(data_urls(files["right.mp4"], 8)) == 8


def test_one_candidate_at_a_time(endpoint: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(files, "right.png", "wrong.png", "--endpoint", endpoint, "--family", "2.0-point") == 0
    printed = capsys.readouterr().out
    assert "A right.png" in printed and "B wrong.png" in printed and "alignment" in printed


def test_a_reply_that_says_nothing_is_shown(
    tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with OracleJudge(garbage_rate=1.0).start(tmp_path) as broken:
        assert judge(files, "right.png", "wrong.png", "--endpoint", broken.endpoints[0]) == 1
    printed = capsys.readouterr().out
    assert "no JSON object" in printed and "I like both. Image 1/2!" in printed


@pytest.mark.parametrize(
    ("a", "b", "words", "said"),
    [
        ("right.png", "missing.png", (), "'missing.png' is not there"),
        ("right.png", "broken.png", (), "cannot be read"),
        ("right.mp4", "broken.mp4", (), "cannot be read"),
        ("right.mp4", "half.mp4", (), "was cut short: its end, with the index, is missing"),
        ("right.mp4", "streamed.mp4", (), "of about 32 frames; copy it again"),
        ("right.png", "right.mp4", (), "one is a picture and one a video"),
        ("right.png", "wrong.png", ("--endpoint", "http://127.0.0.1:9/v1"), "no judge answers at"),
        ("right.png", "wrong.png", ("--family", "flux"), "no family 'flux'; there are flex, think"),
        ("right.png", "wrong.png", ("--family", "edit"), "give it with --source"),
        ("right.png", "wrong.png", ("--prompt-file", "nowhere.txt"), "cannot be read as UTF-8 text"),
    ],
)
def test_what_is_wrong_is_said(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], a: str, b: str, words: tuple[str, ...], said: str
) -> None:
    assert judge(files, a, b, "--endpoint", "http://127.0.0.1:9", *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "endpoint",
    [
        "foo", "127.0.0.1:8000", "ftp://127.0.0.1/v1", "http://", "http://127.0.0.1:abc/v1", "http://127.0.0.1:99999",
        "http://[::1:8000", "http://a b/v1", "http://a..b/v1", "http://\u56fe/v1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("named", [(), ("--model", "m")])  # the first request is the list of models, or the question
def test_an_endpoint_that_is_no_address_is_said_to_be_none(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], endpoint: str, named: tuple[str, ...]
) -> None:
    assert judge(files, "right.png", "wrong.png", "--endpoint", endpoint, *named) == 2
    said = capsys.readouterr().err
    assert repr(endpoint) in said and "--endpoint needs one such as http://HOST:PORT/v1" in said
    with pytest.raises(ValueError, match="--endpoint needs one"):
        Asker(Endpoint(url=endpoint, model="m"))


@contextmanager
def answering(said: bytes) -> Iterator[str]:
    """Endpoint of a server that says the same to everybody."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.settimeout(5.0)
                connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(2**20):
                    pass  # closed with something unread, it would be a reset

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # ends accept()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "BadStatusLine"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "IncompleteRead"),
        (b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n\r\n", "LineTooLong"),
    ],
)
@pytest.mark.parametrize("named", [(), ("--model", "m")])
def test_another_protocol_is_no_judge(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], said: bytes, reason: str, named: tuple[str, ...]
) -> None:
    with answering(said) as endpoint:
        assert judge(files, "wrong.png", "wrong.png", "--endpoint", endpoint, *named) == 2
        with pytest.raises(OSError, match=reason):
            machine.get(endpoint)
    printed = capsys.readouterr().err
    assert f"no judge answers at {endpoint}" in printed and reason in printed and "with --endpoint" in printed


def test_a_refusal_that_breaks_off_is_still_one(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with answering(b"HTTP/1.1 401 No\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab") as endpoint:
        assert judge(files, "wrong.png", "wrong.png", "--endpoint", endpoint) == 2
    assert "refuses: HTTP 401" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_texts_are_printed_as_they_are(files: dict[str, str], monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    said = {"reasoning": "[red]so[/b] :smile: \ud800", "score": [1, 2]}
    reply = {"choices": [{"message": {"content": json.dumps(said)}}]}
    odd = {"choices": [{"message": {"content": "[red]no[/b] \ud800"}}]}
    for sent, status in ((reply, 0), (odd, 1)):
        printed = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
        body = json.dumps(sent).encode()
        with answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)) as endpoint:
            words = ["judge", files["wrong.png"], files["wrong.png"], "--prompt", "[red]p[/b] :smile: \udc80"]
            more = ["--endpoint", endpoint, "--model", "m", "--family", "edit-point", "--source", files["right.png"]]
            assert main([*words, *more]) == status
        sys.stdout.flush()
        text = printed.getvalue().decode(encoding)
        assert "[red]p[/b] :smile: \\udc80" in text
        assert ("[red]so[/b] :smile: \\ud800" if status == 0 else "[red]no[/b] \\ud800") in text


CHOICE = '{"choices": [{"message": {"content": %s}, "finish_reason": %s}], "usage": {"completion_tokens": %s}}'


@pytest.mark.parametrize(
    "content",
    [
        CHOICE % ('[{"type": "text", "text": "yes"}]', '"stop"', "1"),
        CHOICE % ("5", '"stop"', "1"),
        CHOICE % ('"yes"', "[1]", "1"),
        CHOICE % ('"yes"', '"stop"', "1e999"),
        CHOICE % ('"yes"', '"stop"', '"many"'),
        '{"choices": ' + "[" * 100_000,
        '{"choices": []}',
        "null",
        "\ud800",
    ],
)
def test_what_is_no_chat_completion_is_called_so(content: str) -> None:
    for family in FAMILIES.values():
        with pytest.raises(ValueError, match="http://x answers, but not with a chat completion"):
            read_answer(content.encode(errors="surrogatepass"), family(), "http://x", 1.0)
    assert refusal("http://x", 400, content[:100_000].encode(errors="replace")).startswith(
        "the judge at http://x refuses"
    )


def test_a_completion_without_text_or_reason_is_read() -> None:
    assert read_answer((CHOICE % ("null", "null", "null")).encode(), Flex(), "http://x", 1.0).text == ""


def test_a_refusal_is_passed_on(endpoint: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--endpoint", endpoint, "--family", "edit", "--source", files["right.png"]]
    assert judge(files, "right.png", "wrong.png", *words) == 2
    assert "refuses: HTTP 400 3 pictures do not make two candidates" in capsys.readouterr().err


def test_every_family_can_be_shown() -> None:
    reply = Reply(status="ok", winner=0.0, dimensions={"x": 0.5}, scores={"x": (0.25, 0.75)})
    for family in FAMILIES.values():
        answer = Answer(reply=reply, text='{"categories": [3, {"dims": 1}], "reason": null}', tokens=1, seconds=0.1)
        assert [row.name for row in rows(answer, family())][-1] == "overall"
    point = Answer(reply=reply, text='{"reasoning": "because"}', tokens=1, seconds=0.1)
    assert list(rows(point, EditPoint()))[-1].notes == ("because",)


@pytest.mark.parametrize("key", ["s3cret\r", "s3cret\n", "two words", "schlüssel"])
def test_a_key_that_no_header_takes_is_refused_without_being_told(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    monkeypatch.setenv("GRPO_FLEX_JUDGE_KEY", key)
    for words in (["judge", files["wrong.png"], files["right.png"], "--prompt", "p"], ["serve", "--model", "."]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "GRPO_FLEX_JUDGE_KEY holds a space, the end of a line" in said and key.strip() not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sft", "README.md"], "'README.md' is no experiment"),
        (["sft", "LICENSE"], "'LICENSE' is no experiment"),
        (["distill", "{file}", "--model", "m", "--out", "{folder}"], "Is a directory"),
        (["distill", "{file}", "--model", "m", "--out", "/proc/nope/x.jsonl"], "/proc/nope"),
        (["benchmark", "{file}", "--model", "m", "--out", "{file}"], "exists"),
    ],
)
def test_ordinary_mistakes_end_with_a_message(
    words: list[str], said: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "p", "candidates": [files["wrong.png"], files["right.png"]], "label": 0}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    assert main([word.format(file=tmp_path / "p.jsonl", folder=tmp_path) for word in words]) == 2
    assert said in (printed := capsys.readouterr().err) and printed.startswith("error: ")
