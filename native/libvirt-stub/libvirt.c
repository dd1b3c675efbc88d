/*
 * What libvmi's KVM driver wants of libvirt, for the tests: there is no libvirt daemon, and the hypervisor is a peer of
 * ours. Every name is that of a domain, but for "no-such-domain". libvmi never calls the last four functions; it only
 * checks that they are there.
 */
#include <stddef.h>
#include <string.h>

#define API __attribute__((visibility("default")))

enum { DOMAIN_ID = 1, LIBVIRT_VERSION = 9000000 };

struct connection { int unused; };
struct domain { int unused; };

static struct connection connection;
static struct domain domain;

/* libvmi passes it back to virConnectOpenAuth. */
API void *virConnectAuthPtrDefault;

API struct connection *virConnectOpenAuth(const char *uri, void *auth, unsigned flags) {
  (void)uri, (void)auth, (void)flags;
  return &connection;
}

API int virConnectClose(struct connection *unused) {
  (void)unused;
  return 0;
}

API int virConnectGetLibVersion(struct connection *unused, unsigned long *version) {
  (void)unused;
  *version = LIBVIRT_VERSION;
  return 0;
}

API struct domain *virDomainLookupByName(struct connection *unused, const char *name) {
  (void)unused;
  return strcmp(name, "no-such-domain") == 0 ? NULL : &domain;
}

API struct domain *virDomainLookupByID(struct connection *unused, int id) {
  (void)unused;
  return id == DOMAIN_ID ? &domain : NULL;
}

API unsigned virDomainGetID(struct domain *unused) {
  (void)unused;
  return DOMAIN_ID;
}

API int virDomainFree(struct domain *unused) {
  (void)unused;
  return 0;
}

API const char *virDomainGetName(struct domain *unused) {
  (void)unused;
  return "guest";
}

API int virDomainGetInfo(struct domain *unused, void *info) {
  (void)unused, (void)info;
  return -1;
}

API int virDomainSuspend(struct domain *unused) {
  (void)unused;
  return -1;
}

API int virDomainResume(struct domain *unused) {
  (void)unused;
  return -1;
}
