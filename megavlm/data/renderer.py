"""Renders a record to a sample in two steps.

A *draft* contains everything that is cheap: the tokens, the targets, and the processed size of each picture. Packing
needs only its length. The pixels are read after the draft has been assigned to a row, so that a packing buffer of a
thousand drafts takes only a few megabytes.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megavlm.base.errors import UserError
from megavlm.chat.template import ChatTemplate
from megavlm.config.data_sections import DataSettings
from megavlm.data.draft import Draft, DraftError
from megavlm.data.positions import mrope_positions
from megavlm.data.processor import Clip, Still, VisionProcessor, limits_of
from megavlm.data.row import IGNORE, Row, Sample, pack
from megavlm.data.targets import Span, first_kept, media_tokens, token_weights
from megavlm.media.files import Find
from megavlm.media.pictures import find_picture
from megavlm.media.videos import find_video
from megavlm.records.records import Kind, Record, check_record
from megavlm.records.remarks import LITERAL_MARK
from megavlm.records.skipped_samples import NO_TARGET, TOO_LONG, UnfitSample
from megavlm.workers.current_sample import PIXELS, reading

END_OF_TEXT = "<|endoftext|>"


class Renderer:
    """Renders records with the processor of a Hugging Face folder.

    Token ids are equal to those that the processor returns for the same messages, and so are the pixels once they have
    been normalised (``runtime.pixels``). Picture and video limits come from the settings or, where these are null, from
    the folder.

    Args:
        hf_dir: folder with config.json, tokenizer and processor files.
        settings: the ``data`` section: seq_length, too_long, append_eos, and the limits of pictures and videos.
        pad_multiple: each sample is padded to a multiple of this many tokens (``Settings.pad_multiple``).

    Attributes:
        room: what limits the length of a sample, with {} for the number of tokens, for messages.
        shorten: what else makes a sample fit, for messages.
        template: the chat template; None if the folder has none.

    Raises:
        UserError: the folder has no Qwen3-VL processor, or the limits contradict each other.
    """

    room = "a row has data.seq_length = {}"
    shorten = "set data.too_long=truncate"

    def __init__(self, hf_dir: str | Path, settings: DataSettings, pad_multiple: int = 1):
        # The tokenizer's threads do not survive the fork of workers, and one text at a time does not need them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.vision = VisionProcessor(Path(hf_dir), settings)
        self.processor = self.vision.hf
        self.tokenizer = self.processor.tokenizer
        self._vision_ends = (self.processor.vision_start_token_id, self.processor.vision_end_token_id)
        self.seq_length, self.pad_multiple = settings.seq_length, pad_multiple
        self.truncates = settings.too_long == "truncate"
        self._end_of_text = _end_of_text(self.tokenizer) if settings.append_eos else ""
        self.pad_id = next(id for id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if id is not None)
        self.template = ChatTemplate(self.processor) if self.processor.chat_template else None

    @classmethod
    def of_prompts(
        cls, hf_dir: str | Path, settings: DataSettings, answer_tokens: int, setting: str = "rollout.max_new_tokens"
    ) -> "Renderer":
        """Makes a renderer of prompts, whose rows leave room for as many tokens as the setting allows for an answer."""
        room = settings.model_copy(update={"seq_length": settings.seq_length - answer_tokens})
        renderer = cls(hf_dir, room)
        renderer.room = f"data.seq_length - {setting} = {settings.seq_length} - {answer_tokens} = {{}}"
        renderer.shorten = f"lower {setting}"
        return renderer

    def encode(self, record: dict, find: Find, source: str, *, kind: Kind, index: int = 0) -> Sample:
        """Render one record completely. Arguments and errors are those of ``draft`` and ``complete``."""
        return self.complete(self.draft(record, find, source, kind=kind, index=index))

    def draft(self, record: dict, find: Find, source: str, *, kind: Kind, index: int = 0) -> Draft:
        """Render everything except the pixels.

        Args:
            record: the parsed line.
            find: locates the media that the record names.
            source: "file:line", for error messages.
            kind: "tune": assistant turns and their end tokens are targets. "pretrain": all tokens after the first are
                targets, except those inserted for pictures and videos. "prompt": no token is a target; assistant
                messages at the end are dropped and the beginning of an answer is added. A ``text`` record is treated
                as a document for both "tune" and "pretrain"; with data.append_eos, its end token is a target, too.
            index: number of the sample in its file.

        Raises:
            UserError: the record cannot be used, the header of a picture or video cannot be read, or (except for
                prompts) the sample has more tokens than a row.
        """
        checked = check_record(record, kind, source)
        stills = [self.vision.place_picture(find_picture(named, find, source)) for named in checked.images]
        checked.fill_boxes([still.size for still in stills], source)
        text, turns = self._text(checked, kind, source)
        self._check_places(text, checked, source)
        fps = self.vision.video_fps
        clips = [self.vision.place_video(find_video(named, find, source, fps)) for named in checked.videos]
        text, replaced = self.vision.insert_media(text, stills, clips)
        queues: dict[str, Iterator[Still | Clip]] = {"image": iter(stills), "video": iter(clips)}
        media = [next(queues[item["type"]]) for item in replaced]
        grids = [(h, w) for t, h, w in (item.grid for item in media) for _ in range(t)]
        frame_grids = np.array(grids, dtype=np.int32).reshape(-1, 2)
        images = [self.vision.images_in_frame(item) for item in media for _ in range(item.grid[0])]
        frame_images = np.array(images, dtype=np.int32)

        encoding = self.tokenizer(text, return_offsets_mapping=True, return_attention_mask=False)
        token_ids = np.array(encoding["input_ids"], dtype=np.int32)
        starts = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]  # characters
        is_visual = self._is_visual(token_ids)
        repeats = np.ones(len(token_ids), dtype=np.int32)
        repeats[is_visual] = frame_grids.prod(axis=1) // self.vision.merge**2
        spans = media_tokens(token_ids, starts, replaced, self._vision_ends)
        weights = token_weights(turns, replaced, starts, spans, otherwise=float(kind != "prompt"))

        if kind != "prompt" and self.truncates and repeats.sum() > self.seq_length:
            first, dropped = first_kept(repeats, spans, self.seq_length)
            num_frames = sum(item.grid[0] for item in media[:dropped])
            token_ids, repeats, weights = token_ids[first:], repeats[first:], weights[first:]
            media, frame_grids, frame_images = media[dropped:], frame_grids[num_frames:], frame_images[num_frames:]
        draft = Draft(
            token_ids=token_ids,
            repeats=repeats,
            weights=weights,
            frame_grids=frame_grids,
            frame_images=frame_images,
            media=media,
            length=int(repeats.sum()),
            source=source,
            index=index,
            remarks=(LITERAL_MARK,) if checked.has_literal_marks else (),
        )
        if kind != "prompt":
            self.check_size(draft)
        return draft

    def complete(self, draft: Draft, pixels: torch.Tensor | None = None) -> Sample:
        """Read the pixels (into `pixels` if given) and expand tokens, targets and positions.

        Raises UserError if a file cannot be read.
        """
        if draft.shares_media:
            pixels = self.vision.no_pixels(0)
        elif pixels is None and len(draft.media) == 1:
            pixels = self.vision.pixel_rows(draft.media[0])
        else:
            pixels = self.vision.no_pixels(draft.num_pixel_rows) if pixels is None else pixels
            rows = [int(np.prod(item.grid)) * self.vision.images_in_frame(item) for item in draft.media]
            for item, part in zip(draft.media, pixels.split(rows), strict=True):
                self.vision.pixel_rows(item, part)
        visual_positions = np.flatnonzero(np.repeat(self._is_visual(draft.token_ids), draft.repeats))
        tokens = torch.from_numpy(np.repeat(draft.token_ids, draft.repeats).astype(np.int64))
        weights = torch.from_numpy(np.repeat(draft.weights, draft.repeats))
        loss_weights = torch.cat([weights[1:], weights.new_zeros(1)])
        next_tokens = torch.cat([tokens[1:], tokens.new_zeros(1)])
        positions = mrope_positions(draft.length, draft.frame_grids, visual_positions, self.vision.merge)
        num_videos = sum(isinstance(item, Clip) for item in draft.media)
        return Sample(
            input_ids=tokens,
            labels=torch.where(loss_weights > 0, next_tokens, IGNORE),
            loss_weights=loss_weights,
            position_ids=torch.from_numpy(positions),
            pixels=pixels,
            frame_images=torch.from_numpy(draft.frame_images),
            frame_grids=torch.from_numpy(draft.frame_grids),
            visual_positions=torch.from_numpy(visual_positions),
            num_images=len(draft.media) - num_videos,
            num_videos=num_videos,
            source=draft.source,
            index=draft.index,
            source_id=draft.source_id,
            shares_media=draft.shares_media,
            annotations=draft.annotations,
            remarks=draft.remarks,
            pixel_scale=self.vision.pixel_scale,
        )

    def pack(self, samples: Sequence[Sample], seq_length: int | None = None, pixels: torch.Tensor | None = None) -> Row:
        """Pack samples into one row of `seq_length` tokens (default: data.seq_length); see ``row.pack``."""
        vision = self.vision
        return pack(
            samples,
            seq_length or self.seq_length,
            pad_id=self.pad_id,
            grid_side=vision.grid_side,
            merge=vision.merge,
            pad_multiple=self.pad_multiple,
            pixels=pixels,
        )

    def complete_row(self, drafts: Sequence[Draft]) -> Row:
        """Complete drafts and pack them. Raises DraftError for the first draft with an unreadable file.

        The pixels are written only once, directly into the shared memory in which a worker process passes the row to
        the trainer.
        """
        counts = [draft.num_pixel_rows for draft in drafts]
        pixels = _empty_shared(sum(counts), self.vision.pixel_width)
        parts = pixels.split(counts)
        samples = []
        for place, (draft, part) in enumerate(zip(drafts, parts, strict=True)):
            try:
                with reading(PIXELS, draft.source_id, draft.index):
                    samples += [self.complete(draft, part), *(self.complete(other) for other in draft.followers)]
            except MemoryError:
                raise
            except Exception as error:
                raise DraftError(place) from error
        return self.pack(samples, pixels=pixels)

    def _text(self, record: Record, kind: Kind, source: str) -> tuple[str, list[Span] | None]:
        """The record as text with one placeholder per picture or video, and the turns that are targets.

        The turns are None if the targets do not depend on turns.
        """
        processor = self.processor
        if record.text is not None:
            placeholder = {"image": processor.image_token, "video": processor.video_token}
            parts = [
                part["text"]
                if part["type"] == "text"
                else processor.vision_start_token + placeholder[part["type"]] + processor.vision_end_token
                for part in record.text
            ]
            text = "".join(parts)
            return text if kind == "prompt" else text.removesuffix(self._end_of_text) + self._end_of_text, None
        assert record.messages is not None, "a checked record has either text or messages"
        if self.template is None:
            raise UserError(
                f"{source}: messages require a chat template, but the processor in model.hf has none",
                "add the model's chat_template.jinja to the folder",
            )
        if kind == "tune":
            return self.template.turns(record.messages, record.weights, record.tools, source)
        return self.template.render(record.messages, record.tools, prompt=kind == "prompt", source=source), None

    def _check_places(self, text: str, record: Record, source: str) -> None:
        """Raises UserError unless there is one placeholder per file; templates may drop some, texts may add some."""
        for token, media in ((self.processor.image_token, record.images), (self.processor.video_token, record.videos)):
            if text.count(token) != len(media):
                raise UserError(
                    f"{source}: the rendered text has {text.count(token)} {token} for {len(media)} files",
                    f"put pictures and videos only into user messages, and remove {token} from the text itself",
                )

    def check_size(self, draft: Draft) -> None:
        """Raises UnfitSample if a draft has no target token, or is longer than a row together with its followers."""
        if not draft.weights[1:].any():
            message = f"{draft.source}: the sample has no target token, so it does not contribute to the loss"
            raise UnfitSample(NO_TARGET, message, "remove the sample")
        self.check_length(draft)

    def check_length(self, draft: Draft) -> None:
        """Raises UnfitSample if a draft is longer than a row together with its followers."""
        if draft.padded_length(self.pad_multiple) > self.seq_length:
            drafts = (draft, *draft.followers)
            visual = sum(int(d.repeats[self._is_visual(d.token_ids)].sum()) for d in drafts)
            smaller = f"lower {limits_of(draft.media)}, " if draft.media else ""
            raise UnfitSample(
                TOO_LONG,
                f"{draft.source}: the sample has {sum(d.length for d in drafts)} tokens ({visual} of them visual), but "
                f"{self.room.format(self.seq_length)}",
                f"raise data.seq_length, {smaller}or {self.shorten}",
            )

    def _is_visual(self, token_ids: np.ndarray) -> np.ndarray:
        return (token_ids == self.processor.image_token_id) | (token_ids == self.processor.video_token_id)


def _end_of_text(tokenizer: Any) -> str:
    """The token that ends a document: <|endoftext|> in Qwen's vocabularies, otherwise the tokenizer's end token."""
    known = tokenizer.convert_tokens_to_ids(END_OF_TEXT) not in (None, tokenizer.unk_token_id)
    return END_OF_TEXT if known else tokenizer.eos_token or ""


def _empty_shared(rows: int, width: int) -> torch.Tensor:
    """An uninitialised uint8 matrix. In a worker process it is in shared memory, as in torch's collate functions."""
    if torch.utils.data.get_worker_info() is None or not rows:
        return torch.empty(rows, width, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(rows * width)
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(rows, width)
