"""The floor of the house: samples, HTTP, event loops, function loading, prompt files; no Ray, engine or trainer."""
