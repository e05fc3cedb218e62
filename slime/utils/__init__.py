"""The floor of the house: samples, HTTP, event loops, function loading and prompt files; no Ray, no engine, no trainer."""
