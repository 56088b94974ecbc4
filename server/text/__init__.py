"""Text on its way in (templates, encoding) and out (detokenising, stop strings). No torch."""
