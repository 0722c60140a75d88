// Lets a test say what the emulated device is, and in which order its threads run. For ctypes.
#include "../cuda/machine.h"

extern "C" __attribute__((visibility("default"))) void sdattn_emulate(int multiprocessors, int shared_per_block, int major,
                                                                      int minor, int reversed) {
  sdattn::cuda::emulated::device = {multiprocessors, shared_per_block, major, minor, reversed != 0};
}
