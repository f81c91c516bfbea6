// The extension module ssm_kernels._cpu: one registration per operator.
#include <ssm/device.h>

#include "operators.h"
#include "tensor_arg.h"

namespace ssm::bind {

#define SSM_DECLARE(op) void register_##op(nb::module_& module);
SSM_OPERATORS(SSM_DECLARE)
#undef SSM_DECLARE

void register_device(nb::module_& module);

}  // namespace ssm::bind

NB_MODULE(_cpu, module) {
    module.doc() = "CPU kernels of ssm-kernels. Arrays cross by DLPack; outputs are arguments.";
    ssm::bind::register_device(module);
#define SSM_REGISTER(op) ssm::bind::register_##op(module);
    SSM_OPERATORS(SSM_REGISTER)
#undef SSM_REGISTER
}
