"""plad_fast inside other libraries' trainers."""
