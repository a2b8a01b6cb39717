"""Help with prompts: a few words in, a longer prompt out, for a person to read and change. No video model needs it."""
