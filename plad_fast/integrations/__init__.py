"""plad_fast inside other libraries' trainers; each module needs the library it is named after."""
