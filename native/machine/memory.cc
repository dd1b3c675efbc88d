#include "memory.h"

#include <sys/mman.h>

#include "error.h"

namespace memtables {

HostMemory::HostMemory(uint64_t bytes) : size_(bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw MachineError("no address space for " + std::to_string(bytes) + " bytes");
  data_ = static_cast<uint8_t*>(memory);
}

HostMemory::~HostMemory() { munmap(data_, size_); }

}  // namespace memtables
