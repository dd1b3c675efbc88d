#pragma once

#include <cstddef>
#include <cstdint>

/**
 * KVMI version 1: what travels over the socket, as seen from the introspector's side. Everything is little endian,
 * as is the only machine this is built for. Fields named `reserved` are sent as zero and not looked at.
 */
namespace kvmi::wire {

enum class MessageId : uint16_t {
  kEventReply = 0,
  kEvent = 1,
  kGetVersion = 2,
  kGetGuestInfo = 5,
  kPauseVcpu = 7,
  kControlEvents = 9,
  kGetRegisters = 13,
  kSetRegisters = 14,
  kReadPhysical = 17,
  kWritePhysical = 18,
  kSetPageAccess = 21,
  kControlCommandResponse = 27,
  kGetMaxGfn = 29,
  kControlSingleStep = 63,
};

enum class EventId : uint8_t {
  kControlRegister = 1,
  kMsr = 2,
  kPageFault = 6,
  kPauseVcpu = 10,
  kSingleStep = 11,
};
constexpr unsigned kEventIds = 14;

constexpr size_t kMaxBody = 8184;
constexpr uint32_t kMinVersion = 1;

constexpr uint8_t kActionContinue = 0;

constexpr uint8_t kAccessRead = 1;
constexpr uint8_t kAccessWrite = 2;
constexpr uint8_t kAccessExecute = 4;
constexpr uint8_t kAccessAll = kAccessRead | kAccessWrite | kAccessExecute;

struct Header {
  uint16_t id;
  uint16_t size;
  uint32_t sequence;
};
static_assert(sizeof(Header) == 8);

/** The hypervisor's greeting: it begins with its own size, and may be longer than what is known of it. */
constexpr uint32_t kMinGreeting = 32;
constexpr uint32_t kMaxGreeting = 64 * 1024;

struct GreetingReply {
  uint32_t size;
  uint8_t cookieHash[20];
};
static_assert(sizeof(GreetingReply) == 24);

/** Every command's reply begins with it. */
struct Status {
  int32_t error;
  uint32_t reserved;
};
static_assert(sizeof(Status) == 8);

struct Version {
  uint32_t version;
  uint32_t reserved;
  uint8_t features[8];
};
static_assert(sizeof(Version) == 16);

struct GuestInfo {
  uint32_t vcpuCount;
  uint32_t reserved[3];
};
static_assert(sizeof(GuestInfo) == 16);

struct VcpuHeader {
  uint16_t vcpu;
  uint16_t reserved1;
  uint32_t reserved2;
};
static_assert(sizeof(VcpuHeader) == 8);

struct ControlEvents {
  uint16_t event;
  uint8_t enable;
  uint8_t reserved[5];
};
static_assert(sizeof(ControlEvents) == 8);

struct ControlSingleStep {
  uint8_t enable;
  uint8_t reserved[7];
};
static_assert(sizeof(ControlSingleStep) == 8);

struct ControlCommandResponse {
  uint8_t enable;
  uint8_t now;
  uint8_t reserved[6];
};
static_assert(sizeof(ControlCommandResponse) == 8);

struct PauseVcpu {
  uint8_t wait;
  uint8_t reserved[7];
};
static_assert(sizeof(PauseVcpu) == 8);

struct PhysicalRange {
  uint64_t gpa;
  uint64_t size;
};
static_assert(sizeof(PhysicalRange) == 16);

struct SetPageAccess {
  uint16_t view;
  uint16_t count;
  uint32_t reserved;
};
static_assert(sizeof(SetPageAccess) == 8);

struct PageAccess {
  uint64_t gpa;
  uint8_t access;
  uint8_t reserved[7];
};
static_assert(sizeof(PageAccess) == 16);

struct Registers {
  uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
  uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
  uint64_t rip, rflags;
};
static_assert(sizeof(Registers) == 144);

struct Segment {
  uint64_t base;
  uint32_t limit;
  uint16_t selector;
  uint8_t type, present, dpl, db, s, l, g, avl;
  uint8_t reserved[2];
};
static_assert(sizeof(Segment) == 24);

struct DescriptorTable {
  uint64_t base;
  uint16_t limit;
  uint16_t reserved[3];
};
static_assert(sizeof(DescriptorTable) == 16);

struct SpecialRegisters {
  Segment cs, ds, es, fs, gs, ss, tr, ldt;
  DescriptorTable gdt, idt;
  uint64_t cr0, cr2, cr3, cr4, cr8, efer, apicBase;
  uint64_t interruptBitmap[4];
};
static_assert(sizeof(SpecialRegisters) == 312);

struct GetRegisters {
  uint16_t msrCount;
  uint16_t reserved1;
  uint32_t reserved2;
};
static_assert(sizeof(GetRegisters) == 8);

struct RegistersReply {
  uint32_t mode;
  uint32_t reserved1;
  Registers general;
  SpecialRegisters special;
  uint32_t msrCount;
  uint32_t reserved2;
};
static_assert(sizeof(RegistersReply) == 472);

struct Msr {
  uint32_t index;
  uint32_t reserved;
  uint64_t value;
};
static_assert(sizeof(Msr) == 16);

/** What all events begin with. A newer hypervisor may send more: `size` says where the event's own part begins. */
struct EventCommon {
  uint16_t size;
  uint16_t vcpu;
  uint8_t event;
  uint8_t reserved1[3];
  uint8_t mode;
  uint8_t reserved2;
  uint16_t view;
  uint32_t reserved3;
  Registers general;
  SpecialRegisters special;
  uint64_t msrs[9];
};
static_assert(sizeof(EventCommon) == 544);
static_assert(offsetof(EventCommon, general) == 16);
static_assert(offsetof(EventCommon, special) == 160);

struct PageFault {
  uint64_t gva;
  uint64_t gpa;
  uint8_t access;
  uint8_t reserved1;
  uint16_t view;
  uint32_t reserved2;
};
static_assert(sizeof(PageFault) == 24);

struct SingleStep {
  uint8_t failed;
  uint8_t reserved[7];
};
static_assert(sizeof(SingleStep) == 8);

/** A write to a control register or an MSR. */
struct RegisterWrite {
  uint64_t which;
  uint64_t oldValue;
  uint64_t newValue;
};
static_assert(sizeof(RegisterWrite) == 24);

struct EventReply {
  uint8_t action;
  uint8_t event;
  uint8_t reserved[6];
};
static_assert(sizeof(EventReply) == 8);

struct PageFaultReply {
  uint64_t dataAddress;
  uint32_t dataSize;
  uint8_t singleStep;
  uint8_t repComplete;
  uint16_t reserved;
  uint8_t data[256];
};
static_assert(sizeof(PageFaultReply) == 272);

struct RegisterWriteReply {
  uint64_t newValue;
};
static_assert(sizeof(RegisterWriteReply) == 8);

}  // namespace kvmi::wire
