// Where program-scope variables lie: the segments of the loaded libraries.
#include "state.h"

#if defined(__APPLE__)
#include <mach-o/dyld.h>
#include <mach-o/loader.h>
#include <mach/vm_prot.h>
#else
#include <link.h>
#endif

namespace rt {

namespace {

struct Range {
  uintptr_t lo, hi;
  bool writable;
};
std::vector<Range> ranges;

#if defined(__APPLE__)
void add_image(uint32_t image) {
  auto* header = reinterpret_cast<const mach_header_64*>(_dyld_get_image_header(image));
  uintptr_t slide = static_cast<uintptr_t>(_dyld_get_image_vmaddr_slide(image));
  if (!header || header->magic != MH_MAGIC_64) return;
  auto* command = reinterpret_cast<const load_command*>(header + 1);
  for (uint32_t i = 0; i < header->ncmds; i++) {
    if (command->cmd == LC_SEGMENT_64) {
      auto* segment = reinterpret_cast<const segment_command_64*>(command);
      uintptr_t lo = segment->vmaddr + slide;
      if (segment->initprot)  // not __PAGEZERO
        ranges.push_back({lo, lo + segment->vmsize, (segment->initprot & VM_PROT_WRITE) != 0});
    }
    auto* bytes = reinterpret_cast<const char*>(command) + command->cmdsize;
    command = reinterpret_cast<const load_command*>(bytes);
  }
}
#else
int add_object(struct dl_phdr_info* object, size_t, void*) {
  for (int k = 0; k < object->dlpi_phnum; k++) {
    const auto& header = object->dlpi_phdr[k];
    if (header.p_type != PT_LOAD) continue;
    uintptr_t lo = object->dlpi_addr + header.p_vaddr;
    ranges.push_back({lo, lo + header.p_memsz, (header.p_flags & PF_W) != 0});
  }
  return 0;
}
#endif

}  // namespace

void find_segments() {
  ranges.clear();
#if defined(__APPLE__)
  for (uint32_t i = 0; i < _dyld_image_count(); i++) add_image(i);
#else
  dl_iterate_phdr(add_object, nullptr);
#endif
}

Segment segment_of(uintptr_t at) {
  for (const Range& range : ranges)
    if (at >= range.lo && at < range.hi)
      return range.writable ? Segment::writable : Segment::read_only;
  return Segment::none;
}

}  // namespace rt
