#include "domain.h"

#include <array>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../vmi/log.h"

namespace xen {
namespace {

bool hasName(xs_handle *store, uint32_t domain, const char *name) {
  const std::string path = "/local/domain/" + std::to_string(domain) + "/name";
  unsigned length = 0;
  const std::unique_ptr<char, decltype(&free)> found(
      static_cast<char *>(xs_read(store, XBT_NULL, path.c_str(), &length)), free);
  return found && length == strlen(name) && memcmp(found.get(), name, length) == 0;
}

}  // namespace

std::optional<DomainInfo> domainInfo(xc_interface *control, uint32_t domain) {
  DomainInfo info{};
  // It tells of the next domain there is, if this one is not.
  if (xc_domain_getinfolist(control, domain, 1, &info) != 1 || info.domain != domain) return std::nullopt;
  if (info.flags & XEN_DOMINF_dying) return std::nullopt;
  return info;
}

std::optional<uint32_t> findDomain(xc_interface *control, const char *name) {
  const std::unique_ptr<xs_handle, decltype(&xs_close)> store(xs_open(XS_OPEN_READONLY), xs_close);
  if (!store) {
    vmi::complain("xenstore cannot be reached: %s", strerror(errno));
    return std::nullopt;
  }
  std::array<DomainInfo, 64> infos;
  for (uint32_t first = 0; first < DOMID_FIRST_RESERVED;) {
    const int count = xc_domain_getinfolist(control, first, infos.size(), infos.data());
    if (count <= 0 || static_cast<size_t>(count) > infos.size()) return std::nullopt;
    for (int i = 0; i < count; i++)
      if (hasName(store.get(), infos[i].domain, name)) return infos[i].domain;
    if (infos[count - 1].domain < first) return std::nullopt;
    first = infos[count - 1].domain + 1u;
  }
  return std::nullopt;
}

}  // namespace xen
