#include "selective_scan_tile.h"
namespace ssm::cpu::SSM_ISA {
void selective_scan_bwd(const SelectiveScanArgs&, const SelectiveScanGrads&, const Runs&, int) {}
}
