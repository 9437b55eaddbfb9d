"""Pages and plots for people: report.html, loss.png, and the page of `megavlm data inspect`."""
