// The extension module ssm_kernels._cuda: gives the CUDA kernels to the fronts, which live in _cpu.
// Loads on a machine without a driver; a call then says what is missing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "../cuda/architecture.h"
#include "../cuda/device.h"
#include "../cuda/kernels.h"

namespace nb = nanobind;

namespace {

constexpr ssm::cuda::Kernels kernels = ssm::cuda::linked_kernels(ssm::DeviceType::cuda);

}  // namespace

NB_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of ssm-kernels. Importing it makes every operator take them.";
    module.def(
        "devices",
        [] {
            nb::list names;
            for (int index = 0; index < ssm::cuda::device_count(); ++index)
                names.append(ssm::cuda::device_name(index).c_str());
            return names;
        },
        "Names of the GPUs that the driver shows.");
    module.def(
        "fault", [] { return ssm::cuda::device_fault(); },
        "Why no GPU can be used, in the words of the CUDA runtime; '' if one can.");
    module.def("runs_on", &ssm::cuda::runs_on, nb::arg("major"), nb::arg("minor"),
               "Whether the code of this build runs on a GPU of that compute capability.");
    module.def(
        "architecture_fault", &ssm::cuda::architecture_fault, nb::arg("index"),
        "Why the code of this build does not run on a GPU, and the remedy; '' if it does, and "
        "where there is no such GPU.");
    module.attr("architectures") = nb::str(ssm::cuda::architectures()).attr("split")();
    module.attr("operators") = nb::str(SSM_CUDA_OPERATORS).attr("split")();
    nb::module_::import_("ssm_kernels._cpu")
        .attr("_use_cuda_kernels")(reinterpret_cast<std::uintptr_t>(&kernels));
}
