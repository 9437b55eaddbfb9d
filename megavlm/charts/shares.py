"""A bar that shows what a whole consists of, with a legend that tells every share."""

from collections.abc import Callable, Mapping

from markupsafe import Markup

from megavlm.base.number_format import percent


def shares_bar(
    title: str, parts: Mapping[str, float], colors: Mapping[str, str], label: Callable[[float], str], note: str = ""
) -> Markup:
    """One bar as HTML.

    Args:
        title: the title.
        parts: what the whole consists of, in the order of the bar; what is not positive is left out.
        colors: the name of the page's CSS variable for each part; "soft" for others.
        label: formats a value.
        note: what the values are, beside the title.
    """
    parts = {name: value for name, value in parts.items() if value > 0}
    total = sum(parts.values()) or 1.0
    start, bars, keys = 0.0, [], []
    for name, value in parts.items():
        width, text = 1000 * value / total, f"{name} {label(value)}, {percent(value / total, 0)}"
        color = colors.get(name, "soft")
        bars.append(
            Markup(
                '<rect x="{:.2f}" y="0" width="{:.2f}" height="40" style="fill:var(--{})"><title>{}</title></rect>'
            ).format(start, width, color, text)
        )
        keys.append(Markup('<span class="key" style="--color:var(--{})">{}</span> ').format(color, text))
        start += width
    return Markup(
        '<figure class="chart"><figcaption><b>{title}</b><span class="soft">{note}</span></figcaption>'
        '<svg viewBox="0 0 1000 40" preserveAspectRatio="none" role="img" aria-label="{title}" '
        'style="width:100%;height:40px">{bars}</svg><p>{keys}</p></figure>'
    ).format(title=title, note=note, bars=Markup("").join(bars), keys=Markup("").join(keys))
