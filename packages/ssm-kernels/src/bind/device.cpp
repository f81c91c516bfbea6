// Python binding of the process-wide choices, and of the vector functions for their tests.
#include <ssm/device.h>

#include "../op/ceiling.h"
#include "../op/cuda_kernels.h"
#include "../op/scratch.h"
#include "../op/vmath.h"
#include "tensor_arg.h"

namespace ssm::bind {

using namespace nb::literals;

void register_device(nb::module_& module) {
    module.def("version", &version, "Version of the compiled library.");
    module.def(
        "active_isa", [] { return isa_name(active_isa()); },
        "Instruction set that serves calls: 'avx512', 'avx2' or 'baseline'.");
    module.def(
        "available_isas",
        [] {
            nb::list names;
            for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
                if (isa_available(isa)) names.append(isa_name(isa));
            return names;
        },
        "Instruction sets that this build has and this processor can run.");
    module.def("get_num_threads", &num_threads, "Threads of a call that does not name a number.");
    module.def("set_num_threads", &set_num_threads, "count"_a,
               R"(Set the threads of calls that do not name a number.

Args:
    count: at least 1.

Raises:
    ValueError: count is below 1.
)");
    module.def(
        "_use_cuda_kernels",
        [](std::uintptr_t address) {
            use_cuda_kernels(reinterpret_cast<const cuda::Kernels*>(address));
        },
        "address"_a, "Take the CUDA kernels whose table lies at an address; 0 takes none.");
    module.def(
        "_guard_scratch", &guard_scratch, "on"_a,
        "For tests: working memory is new in every call, begins as NaN and ends where access "
        "does.");
    module.def(
        "_noop",
        [](const Input& a, const Input& b, const Input& c, const Input& d, const Input& e,
           const Input& f, const Input& g, const Input& h) {
            int axes = 0;
            for (const Input* arg : {&a, &b, &c, &d, &e, &f, &g, &h}) axes += arg->view.ndim;
            return axes;
        },
        "a"_a.none(), "b"_a.none(), "c"_a.none(), "d"_a.none(), "e"_a.none(), "f"_a.none(),
        "g"_a.none(), "h"_a.none(),
        "Take eight arrays and return the sum of their ranks: the price of a call.");
    module.def(
        "_vmath",
        [](const char* function, const Input& x, const Output& y) {
            vmath(function, view("vmath", "x", x), view("vmath", "y", y));
        },
        "function"_a, "x"_a, "y"_a,
        "Apply one vector function: exp2, exp_bounded, log1p_unit, softplus, sigmoid, silu.");
    module.def("_ceiling", &ceiling, nb::call_guard<nb::gil_scoped_release>(), "name"_a,
               "threads"_a, "seconds"_a, "bytes"_a = 0,
               "Measure a limit of the processor, per second and for all threads together: fma, "
               "exp (elements), "
               "copy, copy_streamed (bytes read plus written).");
}

}  // namespace ssm::bind
