"""Terminal tables, figures, the HTML report and the trace inspector."""
