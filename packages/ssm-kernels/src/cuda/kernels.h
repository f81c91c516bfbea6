// The CUDA kernels as a table: the front of each operator calls them through it, so that a library
// without the extension module _cuda links and runs.
#pragma once

#include <ssm/dw_causal_conv.h>
#include <ssm/dw_causal_conv_step.h>
#include <ssm/fused_layer_norm.h>
#include <ssm/gated_norm.h>
#include <ssm/selective_scan.h>
#include <ssm/selective_state_step.h>
#include <ssm/ssd_chunk_scan.h>
#include <ssm/ssd_stages.h>
#include <ssm/swiglu.h>

namespace ssm::cuda {

/// X(name, arguments...): one launcher. Arguments are checked and canonical, as the CPU kernels get
/// them; `Exec::workspace` holds what <name>_workspace asks for. Throws std::runtime_error when a
/// launch fails.
#define SSM_CUDA_KERNELS(X)                                                                  \
    X(dw_causal_conv_fwd, const DwCausalConvArgs&, std::int64_t)                             \
    X(dw_causal_conv_bwd, const DwCausalConvArgs&, const DwCausalConvGrads&, std::int64_t)   \
    X(dw_causal_conv_step_fwd, const DwCausalConvStepArgs&)                                  \
    X(fused_layer_norm_fwd, const FusedLayerNormArgs&)                                       \
    X(fused_layer_norm_bwd, const FusedLayerNormArgs&, const FusedLayerNormGrads&)           \
    X(gated_norm_fwd, const GatedNormArgs&)                                                  \
    X(gated_norm_bwd, const GatedNormArgs&, const GatedNormGrads&)                           \
    X(selective_scan_fwd, const SelectiveScanArgs&, std::int64_t)                            \
    X(selective_scan_bwd, const SelectiveScanArgs&, const SelectiveScanGrads&, std::int64_t) \
    X(selective_state_step_fwd, const SelectiveStateStepArgs&)                               \
    X(ssd_chunk_scan_fwd, const SsdChunkScanArgs&, std::int64_t)                             \
    X(ssd_chunk_scan_bwd, const SsdChunkScanArgs&, const SsdChunkScanGrads&, std::int64_t)   \
    X(ssd_chunk_cumsum_fwd, const SsdChunkCumsumArgs&)                                       \
    X(ssd_chunk_cumsum_bwd, const SsdChunkCumsumArgs&, const SsdChunkCumsumGrads&)           \
    X(ssd_chunk_state_fwd, const SsdChunkStateArgs&)                                         \
    X(ssd_chunk_state_bwd, const SsdChunkStateArgs&, const SsdChunkStateGrads&)              \
    X(ssd_state_passing_fwd, const SsdStatePassingArgs&)                                     \
    X(ssd_state_passing_bwd, const SsdStatePassingArgs&, const SsdStatePassingGrads&)        \
    X(ssd_bmm_chunk_fwd, const SsdBmmChunkArgs&)                                             \
    X(ssd_bmm_chunk_bwd, const SsdBmmChunkArgs&, const SsdBmmChunkGrads&)                    \
    X(ssd_chunk_output_fwd, const SsdChunkOutputArgs&)                                       \
    X(ssd_chunk_output_bwd, const SsdChunkOutputArgs&, const SsdChunkOutputGrads&)           \
    X(swiglu_fwd, const SwigluArgs&)                                                         \
    X(swiglu_bwd, const SwigluArgs&, const SwigluGrads&)

#define SSM_DECLARE_KERNEL(name, ...) void name(__VA_ARGS__, const Exec&);
SSM_CUDA_KERNELS(SSM_DECLARE_KERNEL)
#undef SSM_DECLARE_KERNEL

/// X(name, arguments...): the bytes of working memory of a launcher, a function of shapes and
/// strides.
#define SSM_CUDA_WORKSPACES(X)                                                               \
    X(dw_causal_conv_bwd_workspace, const DwCausalConvArgs&, const DwCausalConvGrads&)       \
    X(fused_layer_norm_bwd_workspace, const FusedLayerNormArgs&)                             \
    X(gated_norm_bwd_workspace, const GatedNormArgs&)                                        \
    X(selective_scan_fwd_workspace, const SelectiveScanArgs&)                                \
    X(selective_scan_bwd_workspace, const SelectiveScanArgs&)                                \
    X(ssd_chunk_scan_fwd_workspace, const SsdChunkScanArgs&)                                 \
    X(ssd_chunk_scan_bwd_workspace, const SsdChunkScanArgs&)                                 \
    X(ssd_chunk_cumsum_bwd_workspace, const SsdChunkCumsumArgs&, const SsdChunkCumsumGrads&) \
    X(ssd_state_passing_bwd_workspace, const SsdStatePassingArgs&)                           \
    X(ssd_chunk_output_bwd_workspace, const SsdChunkOutputArgs&)

#define SSM_DECLARE_WORKSPACE(name, ...) std::int64_t name(__VA_ARGS__);
SSM_CUDA_WORKSPACES(SSM_DECLARE_WORKSPACE)
#undef SSM_DECLARE_WORKSPACE

struct Kernels {
    /// The device whose tensors the launchers take. The host's, where they were compiled for it:
    /// then they serve in place of the CPU kernels, for tests.
    DeviceType serves;
#define SSM_KERNEL_ENTRY(name, ...) void (*name)(__VA_ARGS__, const Exec&);
    SSM_CUDA_KERNELS(SSM_KERNEL_ENTRY)
#undef SSM_KERNEL_ENTRY
#define SSM_WORKSPACE_ENTRY(name, ...) std::int64_t (*name)(__VA_ARGS__);
    SSM_CUDA_WORKSPACES(SSM_WORKSPACE_ENTRY)
#undef SSM_WORKSPACE_ENTRY
};

/// The table of the kernels linked beside this function.
inline constexpr Kernels linked_kernels(DeviceType serves) {
#define SSM_ADDRESS(name, ...) &name,
    return {serves, SSM_CUDA_KERNELS(SSM_ADDRESS) SSM_CUDA_WORKSPACES(SSM_ADDRESS)};
#undef SSM_ADDRESS
}

}  // namespace ssm::cuda
