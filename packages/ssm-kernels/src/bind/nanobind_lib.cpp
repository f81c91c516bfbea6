// The run-time half of nanobind, compiled from the sources its wheel carries. Including it by name keeps
// Meson from refusing a source file that lies inside another project's folder, such as ./.venv.
#include <nb_combined.cpp>
