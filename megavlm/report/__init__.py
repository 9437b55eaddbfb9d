"""Pages and plots for people: report.html, loss.png and the page of a plan; the style that all pages have."""
