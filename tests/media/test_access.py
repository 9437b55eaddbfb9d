"""What a record may name: files outside of the allowed folders, other hosts, and addresses inside the network."""

import http.server
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from megavlm.base.errors import UserError
from megavlm.cli.main import main
from megavlm.config.settings import DataSettings
from megavlm.data.loader import build_loader
from megavlm.media.access import MediaAccess, is_public
from megavlm.media.files import File
from megavlm.media.pictures import Picture, find_picture
from megavlm.media.videos import Video
from megavlm.sources.blend import media_access, open_file
from megavlm.sources.jsonl import JsonlFile
from megavlm.sources.shards import ShardFolder


@pytest.fixture
def serve(media):
    """serve(address): a web server there with the files of `media`, and all paths that it was asked for.

    /to/URL redirects to the URL.
    """
    servers = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self):
            self.server.asked.append(self.path)
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
                return None
            return super().send_head()

        def log_message(self, *_):
            pass

    def serve(address: str):
        server = http.server.ThreadingHTTPServer((address, 0), lambda *a: Handler(*a, directory=media.base))
        server.asked = []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server, f"http://{address}:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def size_of(access: MediaAccess, data_file: object, named: str) -> tuple[int, int]:
    return find_picture(named, lambda name: access.find(str(data_file), "a.jsonl:3", name), "a.jsonl:3").size()


def refused(access: MediaAccess, data_file: object, named: str) -> str:
    with pytest.raises(UserError) as caught:
        size_of(access, data_file, named)
    assert caught.value.message.startswith("a.jsonl:3: ")
    assert len(str(caught.value)) < 800
    return str(caught.value)


def test_a_file_outside_of_the_media_roots_is_refused_by_name(media, tmp_path):
    shutil.copy(media.base / "tiny.webp", tmp_path / "a.webp")
    outside = media.base / "tiny.webp"
    (tmp_path / "link.webp").symlink_to(outside)
    (tmp_path / "folder").symlink_to(media.base)
    (tmp_path / "inside.webp").symlink_to("a.webp")
    data, access = tmp_path / "data.jsonl", MediaAccess((str(tmp_path), "elsewhere"))
    for allowed in ("a.webp", str(tmp_path / "a.webp"), "inside.webp", f"file://{tmp_path}/a.webp", "./a.webp"):
        assert size_of(access, data, allowed) == (5, 17)
    up = os.path.relpath(outside, tmp_path)
    for named in (str(outside), up, "link.webp", "folder/tiny.webp", f"file://{outside}", f"{tmp_path}/../etc/passwd"):
        assert "outside of data.media_roots" in refused(access, data, named)
        if "etc" not in named:
            assert size_of(MediaAccess(), data, named) == (5, 17)
    assert f"it leads to {outside}" in refused(access, data, "link.webp")
    assert "is not a path" in refused(access, data, "a\0b")
    sibling = MediaAccess((str(tmp_path / "a"),))  # "a.webp" begins with "a" and is not in it
    assert "outside" in refused(sibling, data, "a.webp")


@pytest.mark.parametrize(
    "named",
    [
        "https://images.example/a.png",
        "http://169.254.169.254/latest/meta-data",
        "s3://other/a.png",
        "simplecache::http://127.0.0.1/a.png",
        "s3://bucket/a.png::http://127.0.0.1/",
        "sftp://host/etc/passwd",
        "HTTP://127.0.0.1/a.png",
    ],
)
@pytest.mark.parametrize("data_file", ["data.jsonl", "s3://bucket/data.jsonl"])
def test_urls_of_other_places_than_the_data_file_are_refused_by_setting(named, data_file):
    message = refused(MediaAccess(), data_file, named)
    assert "data.media_protocols" in message or "not a URL that a record may name" in message


def test_urls_that_are_allowed():
    find = lambda data_file, named, *protocols: str(MediaAccess(None, protocols).find(data_file, "a:1", named))
    assert find("s3://bucket/x/data.jsonl", "a.png") == "s3://bucket/x/a.png"
    assert find("s3://bucket/x/data.jsonl", "s3://bucket/b.png") == "s3://bucket/b.png"
    assert find("data.jsonl", "https://images.example/a.png", "https") == "https://images.example/a.png"
    assert find("data.jsonl", "s3://other/a.png", "s3://other") == "s3://other/a.png"
    with pytest.raises(UserError, match="add s3 or s3://another to"):
        find("data.jsonl", "s3://another/a.png", "s3://other")


def test_the_settings_reach_the_samples(model_folder, make_renderer, media, tmp_path):
    shutil.copy(media.base / "tiny.webp", tmp_path / "a.webp")
    named = ["a.webp", str(media.base / "tiny.webp"), "https://images.example/a.png"]
    lines = [json.dumps({"text": "<image>x", "images": [name]}) + "\n" for name in named]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    settings = DataSettings(
        train=[{"path": tmp_path / "data.jsonl"}], seq_length=64, packing="none", workers=0, media_roots=[tmp_path]
    )
    rows = build_loader(settings, make_renderer(seq_length=64), "pretrain", dp_rank=0, dp_size=1, seed=0)
    causes = {s.sample.rpartition(":")[2]: s.cause for _ in range(3) for s in next(rows).skipped_samples}
    assert "outside of data.media_roots" in causes["2"]
    assert "data.media_protocols" in causes["3"]
    assert "1" not in causes
    file = open_file(tmp_path / "data.jsonl", media_access(DataSettings(media_protocols=["https"])))
    _, find = file.read(2)
    assert find("https://images.example/a.png").url == "https://images.example/a.png"


def test_an_address_inside_the_network_gets_no_request(serve, media):
    server, origin = serve("127.0.0.1")
    for named in (f"{origin}/tiny.webp", f"{origin}/clip.mp4", f"http://localhost:{server.server_port}/tiny.webp"):
        assert "inside this machine or network" in refused(MediaAccess(None, ("http",)), "data.jsonl", named)
        file = MediaAccess(None, ("http",)).find("data.jsonl", "a:1", named)
        with pytest.raises(OSError, match="add the host to data"):
            file.read()
        with pytest.raises(UserError, match="inside this machine or network"):
            Video(file, [], None, "a.jsonl:3").probe()
    assert not server.asked
    assert size_of(MediaAccess(None, (origin,)), "data.jsonl", f"{origin}/tiny.webp") == (5, 17)
    assert size_of(MediaAccess(), f"{origin}/data.jsonl", "tiny.webp") == (5, 17)
    assert server.asked


def test_a_redirect_to_an_address_inside_the_network_is_not_followed(serve):
    """The first server is one that the user has named; the second is only where it leads to."""
    (_, origin), (secret, hidden) = serve("127.0.0.1"), serve("127.0.0.2")
    for access in (MediaAccess(None, (origin,)), MediaAccess(None, (origin, "http"))):
        assert "redirects" in refused(access, "data.jsonl", f"{origin}/to/{hidden}/tiny.webp")
        with pytest.raises(OSError, match="redirects"):
            access.find("data.jsonl", "a:1", f"{origin}/to/{hidden}/tiny.webp").read()
    assert not secret.asked
    assert size_of(MediaAccess(None, (origin, hidden)), "data.jsonl", f"{origin}/to/{hidden}/tiny.webp") == (5, 17)


def test_which_addresses_are_public():
    inside = "127.0.0.1 127.8.9.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 ::1 :: "
    inside += "fe80::1%eth0 fd00::1 ::ffff:127.0.0.1 ::ffff:169.254.169.254 2002:7f00:1::1 ff02::1"
    assert not [address for address in inside.split() if is_public(address)]
    assert all(map(is_public, ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34"]))


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nclip.mp4\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile clip.mp4\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
    ids=["hls", "concat", "sdp"],
)
@pytest.mark.parametrize("ending", ["mp4", "m3u8", "ffconcat", "txt"])
def test_a_video_that_is_a_list_of_other_files_is_refused(media, tmp_path, text, ending):
    shutil.copy(media.base / "clip.mp4", tmp_path / "clip.mp4")
    (tmp_path / f"list.{ending}").write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        Video(File(str(tmp_path / f"list.{ending}")), [], None, "a:1").probe()


def test_a_name_with_a_protocol_of_ffmpeg_is_a_file_name(media, monkeypatch):
    """In the current directory, whose files have no folder in their names."""
    monkeypatch.chdir(media.base)
    with pytest.raises(UserError, match="does not exist"):
        Video(MediaAccess().find("data.jsonl", "a:1", "concat:clip.mp4"), [], None, "a:1").probe()
    assert len(Video(MediaAccess().find("data.jsonl", "a:1", "clip.mp4"), [], None, "a:1").probe()) == 23


def test_postscript_is_not_run(tmp_path, media):
    from PIL import Image

    Image.open(media.base / "grey.png").save(tmp_path / "a.eps")
    for ask in (Picture.size, Picture.pixels):
        with pytest.raises(UserError, match="it is PostScript, which is a program"):
            ask(Picture(File(str(tmp_path / "a.eps")), "a:1"))


@pytest.mark.parametrize(
    "counts",
    [
        *({name: 1} for name in ("../a.tar", "/a.tar", "a::http://127.0.0.1/b.tar", "http://127.0.0.1/b.tar")),
        *({"a.tar": count} for count in ("1", -1, None)),
        ["a.tar"],
        3,
        None,
    ],
    ids=str,
)
def test_an_index_of_shards_names_files_of_its_folder_alone(tmp_path, counts):
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta/.info.json").write_text(json.dumps({"shard_counts": counts}))
    with pytest.raises(UserError, match=r"\.info\.json cannot be read"):
        ShardFolder(tmp_path)


# -- data prepare ----------------------------------------------------------------------------------------------------


def prepare(capsys, *arguments: object) -> str:
    """The message with which it ends with status 2."""
    assert main(["data", "prepare", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize("field", ["images", "videos", "frames"])
def test_no_other_file_than_pictures_and_videos_gets_into_a_shard(tmp_path, capsys, field, monkeypatch):
    secret = tmp_path / "passwd.png"
    secret.write_text("root:x:0:0:root:/root:/bin/bash\n" * 40)
    named = {"images": {"images": [str(secret)]}, "videos": {"videos": [str(secret)]}}.get(
        field, {"videos": [{"frames": [str(secret)], "fps": 1}]}
    )
    mark = "<image>" if field == "images" else "<video>"
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": f"{mark}x", **named}) + "\n")
    for ahead in (1 << 24, 0):  # read ahead and checked in memory, or checked in the file
        monkeypatch.setattr("megavlm.prepare.write_shards._READ_AHEAD", ahead)
        message = prepare(capsys, "--jsonl", data, "--out", tmp_path / "shards")
        assert f"{data}:1: {secret} cannot be read: it is neither a picture" in message
        assert "root:x" not in message
    assert not (tmp_path / "shards").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_data_prepare_keeps_to_its_media_roots_and_protocols(media, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "<image>x", "images": [str(media.base / "tiny.webp")]}) + "\n")
    out = ("--jsonl", data, "--out", tmp_path / "shards")
    message = prepare(capsys, *out, "--media-roots", tmp_path)
    assert "data.media_roots" in message
    assert "--media-roots" in message
    data.write_text(json.dumps({"text": "<image>x", "images": ["https://images.example/a.png"]}) + "\n")
    assert "--media-protocols" in prepare(capsys, *out)
    assert "'ftp' is neither protocol://host" in prepare(capsys, *out, "--media-protocols", "ftp")
    assert "--media-roots without --jsonl" in prepare(capsys, tmp_path, "--media-roots", tmp_path)


def test_the_form_of_the_settings(tmp_path):
    assert DataSettings(media_protocols=["https", "ftp://host:21", "s3://bucket"], media_roots=["a"])
    for wrong in ("ftp", "https:", "", "http://", "http://host/folder", "file"):
        with pytest.raises(ValueError, match="is neither protocol://host nor one of"):
            DataSettings(media_protocols=[wrong])
    with pytest.raises(ValueError, match="at least 1"):
        DataSettings(media_roots=[])
    assert JsonlFile.__init__.__defaults__ == (MediaAccess(),)  # strict without settings


# -- programs in data and model folders ------------------------------------------------------------------------------


def test_a_chat_template_cannot_reach_python(model_folder, tmp_path):
    from transformers import AutoProcessor

    from megavlm.chat.template import ChatTemplate

    processor = AutoProcessor.from_pretrained(model_folder)
    trace = tmp_path / "trace"
    for attack in (
        "{{ cycler.__init__.__globals__.os.system('touch %s') }}",
        "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
        "{{ ''.__class__.__base__.__subclasses__()[0].__init__.__globals__['sys'].modules['os'].system('touch %s') }}",
        "{{ raise_exception.__globals__['json'].codecs.open('%s', 'w') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ messages.append(messages) }}",
    ):
        processor.chat_template = attack.replace("%s", str(trace))
        with pytest.raises(UserError, match="the chat template cannot render"):
            ChatTemplate(processor).render([{"role": "user", "content": "?"}], None, "a:1")
    assert not trace.exists()


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch TRACE']", "!!python/name:os.system"])
def test_a_configuration_cannot_run_python(tmp_path, text):
    from megavlm.config.load import load_settings

    trace = tmp_path / "trace"
    value = text.replace("TRACE", str(trace))
    (tmp_path / "a.yaml").write_text(f"model: {{hf: x}}\noutput: {value}\n")
    with pytest.raises(UserError, match="does not parse as YAML"):
        load_settings(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("model: {hf: x}\n")
    with pytest.raises(UserError, match="does not parse as YAML"):
        load_settings(tmp_path / "b.yaml", [f"output={value}"])
    assert not Path(trace).exists()
