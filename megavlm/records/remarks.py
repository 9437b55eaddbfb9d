"""What is done to samples that is worth telling, although they can be used: counted wherever samples are counted."""

REPEATED_PROMPT = "repeated_prompts"
LITERAL_MARK = "literal_marks"

WORDS = {
    REPEATED_PROMPT: "samples whose answers repeat the prompt, which was removed from them: {count}",
    LITERAL_MARK: "texts that contain <image> or <video> and list no such files, so that these are words: {count}",
}
"""For each remark, a sentence with the number of samples. The names are fields of metrics.jsonl."""


def told(counts: dict[str, int]) -> list[str]:
    """A sentence for each remark that was made about at least one sample."""
    return [WORDS[name].format(count=f"{counts[name]:,}") for name in WORDS if counts.get(name)]
