"""Whether the records of the prompts have the fields that the rewards need, judged by some records of each source."""

from collections import Counter
from collections.abc import Sequence

from megavlm.align.sampling_checks import too_few_prompts
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.rewards.columns import missing_fields
from megavlm.sources.blend import Source, evenly

RECORDS = 100  # records of a source that are looked at


def check_prompt_data(settings: Settings, sources: Sequence[Source]) -> list[str]:
    """Looks at records all over each source.

    Returns:
        Remarks: fields that some of the records lack, and whether the data have fewer prompts than a step asks for.

    Raises:
        UserError: no record has what one of the rewards needs, so that it would apply to none.
    """
    remarks, all_missing, all_looked_at = [], Counter[tuple[str, str]](), 0
    for source in sources:
        missing, looked_at = Counter[tuple[str, str]](), 0
        for index in evenly(len(source.file), RECORDS):
            try:
                record = source.file.read(index)[0]
            except UserError:
                continue  # a broken sample, which is told elsewhere
            looked_at += 1
            missing.update(missing_fields(settings.reward, record))
        remarks += [
            f"{source.name}: the reward {reward} needs the field {field}, which {count} of {looked_at} inspected "
            "records lack, or have with a value that it cannot use"
            for (reward, field), count in missing.items()
        ]
        all_missing, all_looked_at = all_missing + missing, all_looked_at + looked_at
    if nowhere := [pair for pair, count in all_missing.items() if count == all_looked_at]:
        listed = "\n".join(
            f"the reward {reward} needs the field {field}, which none of {all_looked_at} inspected records has, or has "
            "with a value that it can use"
            for reward, field in nowhere
        )
        raise UserError(listed, "add the field to the records, name another one (field), or remove the reward")
    total = sum(len(source.file) for source in sources)
    return [*remarks, *too_few_prompts(settings, total)]
