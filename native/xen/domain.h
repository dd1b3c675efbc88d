#pragma once

#include <cstdint>
#include <optional>

#include "handles.h"

namespace xen {

using DomainInfo = xc_domaininfo_t;

/** Nothing if there is no such domain, or it is on its way out. */
std::optional<DomainInfo> domainInfo(xc_interface *control, uint32_t domain);

/** The number of the domain that has this name in xenstore. */
std::optional<uint32_t> findDomain(xc_interface *control, const char *name);

}  // namespace xen
