"""Pages and plots that people look at: report.html, loss.png, the page of `megavlm data inspect`."""
